"""What the end of a batch of pages means, for the transports that move them without the interpreter."""

from __future__ import annotations

from stratakv._native import Ended
from stratakv.pool.errors import DamagedPage, OutOfBounds, TransferCancelled, TransportError, TransportTimeout
from stratakv.pool.headers import header_failure
from stratakv.pool.transport import PageBatch


def check_end(how: tuple[int, int, int], batch: PageBatch, gone: str) -> None:
    """Raises what (an `Ended`, index of the layer, index of the page) means; `gone` says what a hang-up does."""
    ended, index, page = how
    match Ended(ended):
        case Ended.DAMAGED:
            layer = batch.layers[index].number
            raise DamagedPage(f"layer {layer} of a page does not match its checksum", index=page, layer=layer)
        case Ended.HEADER:
            raise header_failure(index, page)
        case Ended.OUT_OF_BOUNDS:
            raise OutOfBounds("a page lies outside the segment, or a row outside its memory")
        case Ended.LATE:
            raise TransportTimeout("the deadline passed")
        case Ended.STOPPED:
            raise TransferCancelled("the transfer was given up")
        case Ended.GONE:
            raise TransportError(gone)
        case Ended.ANSWERED:
            raise TransportError("the daemon answered something else than what it was asked for")
