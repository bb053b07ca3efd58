"""What can be wrong with what a simulation is given."""

from __future__ import annotations

from stratakv.errors import SetupError


class TraceError(SetupError):
    """The trace is not in the format that is read."""

    code = "bad_trace"


class ProfileError(SetupError):
    """There is no such profile of a worker, or it says too little to simulate one."""

    code = "bad_profile"
