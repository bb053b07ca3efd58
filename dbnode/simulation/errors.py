"""What can be wrong with what a simulation is given."""

from __future__ import annotations

from stratakv.errors import SetupError


class TraceError(SetupError):
    """The trace is not in the format that is read."""

    code = "bad_trace"
