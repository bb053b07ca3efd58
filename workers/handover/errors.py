"""Errors of hand-overs.

Unavailable
├── HandoverFailed        the prompt's KV did not get here; the request can go on where it was computed
├── UnknownHandover       no such request is being handed over by this worker
└── MalformedMessage      what arrived is no message of a hand-over
"""

from __future__ import annotations

from stratakv.errors import Unavailable


class HandoverFailed(Unavailable):
    """The prompt's KV did not get to this worker; nothing was generated here."""

    code = "handover_failed"


class UnknownHandover(Unavailable):
    """No such request is being handed over by this worker."""

    code = "handover_unknown"
    http_status = 404


class MalformedMessage(Unavailable):
    """What arrived is no message of a hand-over."""

    code = "handover_malformed"
