"""Copies pages between a daemon's memory and its disk, as the meta server orders, and reports the copies.

A page stays at its old place until the meta server has taken the new one. One thread does all copying, so a disk that stalls
holds up nothing else. What becomes of a report that gets no answer is asked for again by repeating it.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dmp.disk.store import DiskStore
from dmp.errors import DiskFailed, DiskFull
from dmp.metrics import DaemonMetrics, Direction
from dmp.pages import read_page
from dmp.puts import PutTable
from dmp.segment import MemorySegment
from stratakv.errors import StrataError, Unavailable
from stratakv.layout import HEADER_BYTES, PageHeader
from stratakv.log import EventLogger
from stratakv.pool.errors import SegmentFull
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import PUT_ID_BYTES, Extent, Move, MovedPage, MovesTaken, ReportMoves, Segment

BATCH_PAGES = 32
"""Copied, made durable and reported together."""
WAITING_MAX = 65_536
"""Orders beyond are refused; the meta server forgets them after a while and gives them again."""
REPORT_RETRY_S = 1.0
REPORT_TIMEOUT_S = 600.0
"""A report that got no answer for so long is given up, and the copies with it. Should the meta server have taken them after
all, readers find nothing there, report that, and the entries go."""
log = EventLogger("dmp.mover")


@dataclass(frozen=True, slots=True)
class _Copied:
    """What one batch came to."""

    direction: Direction
    source: Segment
    target: Segment
    pages: list[MovedPage]
    failed: list[Extent]
    taken: Callable[[], None]
    """Called when the meta server has taken the pages."""
    refused: Callable[[Sequence[MovedPage]], None]
    """Called with those it has not."""


class Mover:
    """One queue for both directions and for the disk's own compaction."""

    def __init__(
        self,
        client: MetaClient,
        memory: MemorySegment,
        puts: PutTable,
        store: DiskStore,
        segments: tuple[Segment, Segment],
        metrics: DaemonMetrics,
    ) -> None:
        """`segments`: the memory's and the disk's, as the meta server knows them."""
        self._client = client
        self._memory = memory
        self._puts = puts
        self._store = store
        self._memory_segment, self._disk_segment = segments
        self._metrics = metrics
        self._waiting: deque[tuple[Callable[[Sequence[Move]], _Copied], Move]] = deque()
        self._wake = asyncio.Event()

    def demote(self, moves: Iterable[Move]) -> None:
        """Memory → disk."""
        self._add(self._to_disk, moves)

    def promote(self, moves: Iterable[Move]) -> None:
        """Disk → memory."""
        self._add(self._to_memory, moves)

    def compact(self, extents: Iterable[Extent]) -> None:
        """Disk → the newest file of the same disk, unless there is work already."""
        if not self._waiting:
            pages = ((extent, self._store.page(extent)) for extent in extents)
            self._add(self._within_disk, [Move(extent, page.page_bytes) for extent, page in pages if page is not None])

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._wake.wait()
            batch = self._next_batch()
            if batch is None:
                self._wake.clear()
                continue
            await self._carry_out(*batch)

    async def _carry_out(self, copy: Callable[[Sequence[Move]], _Copied], moves: Sequence[Move]) -> None:
        began = time.perf_counter()
        try:
            copied = await asyncio.to_thread(copy, moves)
            self._count(copied, time.perf_counter() - began)
            await self._report(copied)
        except StrataError as error:
            log.warning("pages_not_moved", pages=len(moves), reason=error.message)

    def _add(self, copy: Callable[[Sequence[Move]], _Copied], moves: Iterable[Move]) -> None:
        orders = [(copy, move) for move in moves]
        room = WAITING_MAX - len(self._waiting)
        self._waiting.extend(orders[:room])
        if len(orders) > room:
            log.warning("orders_refused", orders=len(orders) - room)
            self._metrics.orders_refused(len(orders) - room)
        self._wake.set()

    def _count(self, copied: _Copied, seconds: float) -> None:
        size_bytes = sum(page.page_bytes for page in copied.pages)
        self._metrics.moved(copied.direction, len(copied.pages), size_bytes, seconds)
        self._metrics.not_moved(copied.direction, len(copied.failed))

    def _next_batch(self) -> tuple[Callable[[Sequence[Move]], _Copied], list[Move]] | None:
        """Moves of one direction and one size of page."""
        if not self._waiting:
            return None
        copy, first = self._waiting[0]
        moves: list[Move] = []
        while self._waiting and len(moves) < BATCH_PAGES:
            next_copy, move = self._waiting[0]
            if next_copy != copy or move.page_bytes != first.page_bytes:
                break
            moves.append(self._waiting.popleft()[1])
        return copy, moves

    # On a thread of its own

    def _to_disk(self, moves: Sequence[Move]) -> _Copied:
        pages = {move.extent: page for move in moves if (page := read_page(self._memory, self._puts, move)) is not None}
        return self._appended(Direction.DEMOTE, self._memory_segment, moves, pages)

    def _within_disk(self, moves: Sequence[Move]) -> _Copied:
        pages = {move.extent: page for move in moves if (page := self._store.read(move.extent)) is not None}
        return self._appended(Direction.COMPACT, self._disk_segment, moves, pages)

    def _appended(
        self, direction: Direction, source: Segment, moves: Sequence[Move], pages: dict[Extent, bytearray]
    ) -> _Copied:
        try:
            targets = self._store.append(list(pages.values())) if pages else []
        except (DiskFull, DiskFailed) as error:
            log.warning("disk_takes_no_pages", reason=error.message)
            pages, targets = {}, []
        return _Copied(
            direction,
            source,
            self._disk_segment,
            list(_moved(pages, targets)),
            [move.extent for move in moves if move.extent not in pages],
            taken=lambda: None,
            refused=lambda refused: self._store.free([page.target for page in refused]),
        )

    def _to_memory(self, moves: Sequence[Move]) -> _Copied:
        pages = {move.extent: page for move in moves if (page := self._store.read(move.extent)) is not None}
        put_id = os.urandom(PUT_ID_BYTES)
        targets: list[Extent] = []
        try:
            if pages:
                # The meta server knows no such put and would call it void; only the report decides.
                targets = self._puts.allocate(put_id, len(pages), moves[0].page_bytes, math.inf)
        except SegmentFull:
            pages = {}
        for page, target in zip(pages.values(), targets, strict=True):
            self._write_memory(page, target)

        def refused(some: Sequence[MovedPage]) -> None:
            self._puts.commit([put_id])
            self._puts.order_free([page.target for page in some])

        return _Copied(
            Direction.PROMOTE,
            self._disk_segment,
            self._memory_segment,
            list(_moved(pages, targets)),
            [move.extent for move in moves if move.extent not in pages],
            taken=lambda: self._puts.commit([put_id]),
            refused=refused,
        )

    def _write_memory(self, page: bytearray, target: Extent) -> None:
        """Data first; the header names the new place's generation."""
        header = replace(PageHeader.unpack(memoryview(page)[:HEADER_BYTES]), generation=target.generation).pack()
        memory = self._memory.memory
        memory[target.offset + HEADER_BYTES : target.offset + len(page)] = memoryview(page)[HEADER_BYTES:]
        memory[target.offset : target.offset + len(header)] = header

    # On the event loop

    async def _report(self, copied: _Copied) -> None:
        if not copied.pages and not copied.failed:
            return
        report = ReportMoves(
            copied.source.node,
            copied.source.epoch,
            copied.target.node,
            copied.target.epoch,
            copied.pages,
            copied.failed,
        )
        try:
            answer = await self._repeat(report)
        except StrataError:
            copied.refused(copied.pages)
            raise
        copied.taken()
        if answer.refused:
            copied.refused([copied.pages[i] for i in answer.refused])

    async def _repeat(self, report: ReportMoves) -> MovesTaken:
        """Raises StrataError if it is refused, Unavailable if there is no answer for long."""
        deadline = time.monotonic() + REPORT_TIMEOUT_S
        while True:
            try:
                return await self._client.call(report, MovesTaken)
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise
                log.debug("moves_not_reported", reason=error.message)
            await asyncio.sleep(REPORT_RETRY_S)


def _moved(pages: dict[Extent, bytearray], targets: Sequence[Extent]) -> Iterator[MovedPage]:
    for (source, page), target in zip(pages.items(), targets, strict=True):
        header = PageHeader.unpack(memoryview(page)[:HEADER_BYTES])
        yield MovedPage(header.namespace, header.key, source, target, len(page))
