"""Headers of pages, read and written as plain ranges: for transports that cannot send them along with the layers."""

from __future__ import annotations

import numpy as np

from stratakv import _native
from stratakv._native import HeaderState, PageHeaders
from stratakv._native.base import Int64s, UInt64s
from stratakv.layout import packed_header_bytes
from stratakv.pool.errors import DamagedPage, PageError, StalePage
from stratakv.pool.transport import Cancellation, ReadBatch, ReadRange, WriteBatch, WriteRange


def read_headers(
    read_batch: ReadBatch,
    offsets: Int64s,
    headers: PageHeaders,
    checksums: UInt64s,
    *,
    deadline: float,
    cancellation: Cancellation | None,
) -> dict[int, PageError]:
    """Fill `checksums` [layer][page] from the headers of the pages; index → why that page is another. Raises TransportError."""
    size = packed_header_bytes(headers.num_layers)
    raw = memoryview(bytearray(size * len(offsets)))
    views = [raw[at : at + size] for at in range(0, len(raw), size)]
    ranges = [ReadRange(*pair) for pair in zip(offsets.tolist(), views, strict=True)]
    read_batch(ranges, deadline=deadline, cancellation=cancellation)
    places = np.arange(len(offsets), dtype=np.int64) * size
    states = _native.moves.check_headers(raw, places, *headers, checksums)
    return {index: header_failure(state, index) for index, state in enumerate(states) if state}


def require_headers(
    read_batch: ReadBatch,
    offsets: Int64s,
    headers: PageHeaders | None,
    checksums: UInt64s,
    *,
    deadline: float,
    cancellation: Cancellation | None,
) -> None:
    """As `read_headers`, if there are any to be read. Raises the first page's failure."""
    if headers is None:
        return
    failures = read_headers(read_batch, offsets, headers, checksums, deadline=deadline, cancellation=cancellation)
    if failures:
        raise failures[min(failures)]


def write_headers(
    write_batch: WriteBatch,
    put_id: bytes,
    offsets: Int64s,
    headers: PageHeaders | None,
    checksums: UInt64s,
    *,
    deadline: float,
) -> None:
    """The headers of pages whose layers have these checksums [layer][page], if there are any to be written."""
    if headers is None:
        return
    packed = memoryview(_native.moves.pack_headers(*headers, checksums))
    size = packed_header_bytes(headers.num_layers)
    parts = [packed[at : at + size] for at in range(0, len(packed), size)]
    write_batch(put_id, [WriteRange(*pair) for pair in zip(offsets.tolist(), parts, strict=True)], deadline=deadline)


def header_failure(state: int, index: int) -> PageError:
    """What a `HeaderState` that is not good means for the page of this index."""
    match HeaderState(state):
        case HeaderState.OTHER_PAGE:
            return StalePage("another page lies at this place", index=index)
        case HeaderState.OTHER_LAYOUT:
            return StalePage("the page has another layout", index=index)
        case _:
            return DamagedPage("the page's header is not whole", index=index)
