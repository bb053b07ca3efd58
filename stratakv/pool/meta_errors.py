"""Errors between the meta server and its clients; the same classes on both sides of the wire, known by their code.

StrataError
├── PutRefused              nothing of this put will be found
│   ├── PutUnknown          never started here, expired, or revoked
│   ├── PutFinished         it was finished already; its pages are visible
│   └── StaleEpoch          the daemon was started anew since
├── NotLeader               another meta server is to be asked
├── PoolFull                no segment has room now
└── ProtocolMismatch        client and server speak different versions
"""

from __future__ import annotations

from stratakv.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    SetupError,
    StrataError,
    Unavailable,
)


class PutRefused(StrataError):
    """The meta server does not accept this step of a put; nothing was changed."""

    code = "put_refused"
    http_status = 409


class PutUnknown(PutRefused):
    """The put was never started here, has expired, or was revoked; nothing of it will be found."""

    code = "put_unknown"


class PutFinished(PutRefused):
    """The put was finished before; its pages are visible and must not be freed by the writer."""

    code = "put_finished"


class StaleEpoch(PutRefused):
    """The sender's or the segment's epoch is over; a newer start of the same name has registered."""

    code = "stale_epoch"


class PoolFull(Overloaded):
    """No segment has room for a single page now; cold pages are being reclaimed."""

    code = "pool_full"


class NotLeader(Unavailable):
    """This meta server stands by, or has just ceased to lead; whether the request was carried out is for the leader to say."""

    code = "not_leader"


class ProtocolMismatch(SetupError):
    """Client and server speak different versions of the protocol."""

    code = "protocol_mismatch"


ERRORS_BY_CODE: dict[str, type[StrataError]] = {
    cls.code: cls
    for cls in (
        StrataError,
        InvalidRequest,
        Overloaded,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        PutRefused,
        PutUnknown,
        PutFinished,
        StaleEpoch,
        NotLeader,
        PoolFull,
        ProtocolMismatch,
    )
}
"""What a `Failure` turns into at the client; an unknown code becomes StrataError."""
