"""How an error travels: every StrataError becomes a `Failure` that the client turns back into the same class.

The classes that only the pool knows are in `stratakv.pool.meta_errors`, since both sides need them.
"""

from __future__ import annotations

from stratakv.errors import StrataError
from stratakv.wire import Failure


def failure_of(error: StrataError, leader: str = "") -> Failure:
    """The reply that tells a client of `error`, and whom to ask instead."""
    return Failure(code=error.code, message=error.message, retryable=error.retryable, leader=leader)
