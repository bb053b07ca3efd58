"""Pages of the daemon's own memory as a whole, for its disk and for other daemons."""

from __future__ import annotations

from dmp.puts import PutTable
from dmp.segment import MemorySegment
from stratakv.layout import HEADER_BYTES, CorruptPage, PageHeader
from stratakv.wire import Move


def read_page(memory: MemorySegment, puts: PutTable, move: Move) -> bytearray | None:
    """A copy of a page; None if it is not what it should be, or has been freed meanwhile."""
    start = move.extent.offset
    page = bytearray(memory.memory[start : start + move.page_bytes])
    try:
        header = PageHeader.unpack(memoryview(page)[:HEADER_BYTES])
    except CorruptPage:
        return None
    is_same = header.generation == move.extent.generation and puts.is_live(move.extent)
    return page if is_same and len(page) == move.page_bytes else None
