"""What can go wrong between a process and a memory-pool daemon, or with a page (the meta server's: `meta_errors`).

Unavailable
└── TransportError            the daemon does not answer, or the connection to it broke
    ├── TransportTimeout      the deadline passed first
    ├── EpochChanged          the daemon was started anew; places of its earlier epoch are void
    ├── NotAMember            one end does not know the pool's secret
    └── ProtocolMismatch      the other end speaks another version, or not this protocol at all
Overloaded
└── SegmentFull               the daemon has no room for the whole batch; nothing was allocated
InvalidRequest
├── PutRefused                the put is over, unknown, or has another shape
└── OutOfBounds               a range outside the segment or outside the put
Cancelled
└── TransferCancelled
CorruptPage (ValueError)
└── PageError                 one page of a batch is unusable; a miss, never an answer
    ├── DamagedPage           its bytes are not those that were written
    └── StalePage             a whole page, but not the one asked for
"""

from __future__ import annotations

from stratakv.errors import Cancelled, InvalidRequest, Overloaded, Unavailable
from stratakv.layout import CorruptPage


class TransportError(Unavailable):
    """The daemon does not answer, or the connection to it broke."""

    code = "pool_unreachable"


class TransportTimeout(TransportError):
    """The daemon did not answer before the deadline."""

    code = "pool_timeout"


class EpochChanged(TransportError):
    """The daemon was started anew: what is known of its memory is void."""

    code = "pool_epoch_changed"


class ProtocolMismatch(TransportError):
    """The other end speaks another version of the pool protocol."""

    code = "pool_protocol_mismatch"
    retryable = False


class NotAMember(TransportError):
    """One end does not know the secret of the pool, or has another one."""

    code = "not_a_member"
    http_status = 401
    sqlstate = "28000"
    retryable = False


class SegmentFull(Overloaded):
    """The daemon has no room for the whole batch; nothing was allocated."""

    code = "pool_segment_full"


class PutRefused(InvalidRequest):
    """The daemon does not take this request: the put is over, unknown, or has another shape."""

    code = "pool_put_refused"


class OutOfBounds(InvalidRequest):
    """A range lies outside the segment, or outside the pages of its put."""

    code = "pool_out_of_bounds"


class TransferCancelled(Cancelled):
    """The caller gave the transfer up."""

    code = "pool_transfer_cancelled"


class PageError(CorruptPage):
    """One page of a batch is unusable: `index` in the batch, and the layer if its data were at fault."""

    def __init__(self, message: str, *, index: int, layer: int | None = None) -> None:
        super().__init__(message)
        self.index = index
        self.layer = layer


class DamagedPage(PageError):
    """The page's bytes are not those that were written."""


class StalePage(PageError):
    """A whole page lies there, but of another namespace, key, generation or length."""
