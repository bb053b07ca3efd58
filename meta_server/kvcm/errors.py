"""How a request of the KVCM API fails: each error knows its code in `header.status.code`.

KvcmError
├── NoSuchInstance     INSTANCE_NOT_EXIST
├── Duplicate          DUPLICATE_ENTITY
├── CapacityReached    REACH_MAX_ENTITY_CAPACITY
├── NotSupported       UNSUPPORTED
├── StorageFailed      IO_ERROR
├── FaultInjected      INTERNAL_ERROR
├── NodeNotRegistered  NODE_NOT_REGISTERED
├── SnapshotRequired   SNAPSHOT_REQUIRED
└── SnapshotRateLimited  SNAPSHOT_RATE_LIMITED
"""

from __future__ import annotations

import math
from typing import ClassVar

from stratakv.errors import DeadlineExceeded, InvalidRequest, Overloaded, StrataError, Unavailable
from stratakv.pool.meta_errors import NotLeader


class KvcmError(StrataError):
    """A request of the KVCM API failed."""

    kvcm_code: ClassVar[str] = "INTERNAL_ERROR"


class NoSuchInstance(KvcmError):
    """No instance of this id is registered."""

    kvcm_code = "INSTANCE_NOT_EXIST"


class Duplicate(KvcmError):
    """There is one of this name already, with other data."""

    kvcm_code = "DUPLICATE_ENTITY"


class CapacityReached(KvcmError):
    """The group's instances, keys or bytes are at their limit."""

    kvcm_code = "REACH_MAX_ENTITY_CAPACITY"


class NotSupported(KvcmError):
    """This meta server does not do that."""

    kvcm_code = "UNSUPPORTED"


class StorageFailed(KvcmError):
    """A storage could not be used."""

    kvcm_code = "IO_ERROR"


class FaultInjected(KvcmError):
    """DebugService was asked to let this call fail."""


class NodeNotRegistered(KvcmError):
    """The host that reports is not known (any more)."""

    kvcm_code = "NODE_NOT_REGISTERED"


class SnapshotRequired(KvcmError):
    """What is known of the host is not all; only its snapshot helps."""

    kvcm_code = "SNAPSHOT_REQUIRED"


class SnapshotRateLimited(KvcmError):
    """The host's last snapshot was only just taken."""

    kvcm_code = "SNAPSHOT_RATE_LIMITED"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_ms = math.ceil(retry_after_s * 1000)


def code_of(error: StrataError) -> str:
    """The name of an error's code."""
    if isinstance(error, KvcmError):
        return error.kvcm_code
    if isinstance(error, InvalidRequest):
        return "INVALID_ARGUMENT"
    if isinstance(error, NotLeader):
        return "SERVER_NOT_LEADER"
    if isinstance(error, (Unavailable, Overloaded, DeadlineExceeded)):
        return "SERVICE_NOT_READY"
    return "INTERNAL_ERROR"
