"""Hands out extents of a segment: runs of bytes in multiples of 4 KiB, each with a generation.

Free space is kept as maximal runs, found by either end (so that freeing coalesces in constant time) and by size (best fit
over the few distinct sizes there are). A batch prefers one run, so that its extents are consecutive; it is all or nothing.
Not thread-safe: `dmp.puts.PutTable` owns it and its lock.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from dmp.errors import ExtentNotLive
from dmp.live_extents import EXTENT_BYTES_MAX, LiveExtents
from stratakv.layout import ALIGNMENT_BYTES
from stratakv.pool.errors import SegmentFull
from stratakv.wire import Extent


class ExtentAllocator:
    """Extents of `size_bytes` bytes of memory, by offset."""

    def __init__(self, size_bytes: int) -> None:
        if size_bytes <= 0 or size_bytes % ALIGNMENT_BYTES:
            raise ValueError(f"a segment is a positive multiple of {ALIGNMENT_BYTES} bytes, not {size_bytes}")
        self.size_bytes = size_bytes
        self.used_bytes = 0
        self._generation = 0
        self._live = LiveExtents(size_bytes)
        self._free_by_start: dict[int, int] = {}
        self._free_by_end: dict[int, int] = {}
        self._free_by_size: dict[int, dict[int, None]] = {}
        """Size → starts, oldest first."""
        self._free_sizes: list[int] = []
        """Keys of `_free_by_size`, ascending."""
        self._add_free(0, size_bytes)

    @property
    def num_extents(self) -> int:
        return len(self._live)

    def allocate(self, count: int, page_bytes: int) -> list[Extent]:
        """`count` extents, consecutive where possible. Raises SegmentFull without any change."""
        if count <= 0 or not 0 < page_bytes < EXTENT_BYTES_MAX or page_bytes % ALIGNMENT_BYTES:
            raise ValueError(f"pages are counted from 1 and are multiples of {ALIGNMENT_BYTES} bytes")
        if count * page_bytes > self.size_bytes - self.used_bytes:
            raise SegmentFull(f"{count} pages of {page_bytes} bytes do not fit into what is free")
        offsets: list[int] = []
        while len(offsets) < count:
            taken = self._take(count - len(offsets), page_bytes)
            if not taken:
                for offset in offsets:
                    self._add_free(offset, page_bytes)
                raise SegmentFull(f"free space is in pieces too small for {count} pages of {page_bytes} bytes")
            offsets += taken
        return [self._make_live(offset, page_bytes) for offset in offsets]

    def is_live(self, extent: Extent) -> bool:
        """Whether exactly this allocation is in use."""
        live = self._live.get(extent.offset)
        return live is not None and live[0] == extent.generation

    def free(self, extent: Extent) -> None:
        """Give one extent back. Raises ExtentNotLive for a second free, or for an allocation that is history."""
        live = self._live.get(extent.offset)
        if live is None or live[0] != extent.generation:
            raise ExtentNotLive(f"no extent of generation {extent.generation} is in use at {extent.offset}")
        size = live[1]
        self._live.remove(extent.offset)
        self.used_bytes -= size
        self._add_free(extent.offset, size)

    def live(self) -> Iterator[tuple[Extent, int]]:
        """Extents in use and their sizes."""
        for offset, generation, size in self._live:
            yield Extent(offset, generation), size

    @property
    def metadata_bytes(self) -> int:
        """Memory of the bookkeeping of extents, but not of free runs."""
        return self._live.size_bytes

    def free_runs_from(self, start: int) -> Iterator[tuple[int, int]]:
        """Start and size of the free runs, or parts of them, at `start` and behind it, ascending."""
        for begin, size in sorted(self._free_by_start.items()):
            if begin + size > start:
                at = max(begin, start)
                yield at, begin + size - at

    def free_runs(self) -> dict[int, int]:
        """Maximal free runs: start → size."""
        return dict(self._free_by_start)

    def _take(self, count: int, page_bytes: int) -> list[int]:
        """Up to `count` consecutive pages out of the best run; empty if no run holds even one."""
        if not self._free_sizes:
            return []
        at = min(bisect.bisect_left(self._free_sizes, count * page_bytes), len(self._free_sizes) - 1)
        size = self._free_sizes[at]
        pages = min(count, size // page_bytes)
        if not pages:
            return []
        start = next(iter(self._free_by_size[size]))
        self._remove_free(start, size)
        if size > pages * page_bytes:
            self._add_free(start + pages * page_bytes, size - pages * page_bytes)
        return [start + page * page_bytes for page in range(pages)]

    def _make_live(self, offset: int, size: int) -> Extent:
        self._generation += 1
        self._live.add(offset, self._generation, size)
        self.used_bytes += size
        return Extent(offset, self._generation)

    def _add_free(self, start: int, size: int) -> None:
        before = self._free_by_end.get(start)
        if before is not None:
            self._remove_free(before, start - before)
            start, size = before, size + start - before
        after = self._free_by_start.get(start + size)
        if after is not None:
            self._remove_free(start + size, after)
            size += after
        self._free_by_start[start] = size
        self._free_by_end[start + size] = start
        if size not in self._free_by_size:
            self._free_by_size[size] = {}
            bisect.insort(self._free_sizes, size)
        self._free_by_size[size][start] = None

    def _remove_free(self, start: int, size: int) -> None:
        del self._free_by_start[start]
        del self._free_by_end[start + size]
        starts = self._free_by_size[size]
        del starts[start]
        if not starts:
            del self._free_by_size[size]
            del self._free_sizes[bisect.bisect_left(self._free_sizes, size)]
