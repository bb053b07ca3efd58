"""Copies pages to other daemons, as the meta server orders: of a draining daemon, or hot ones. Each batch is a put of its own.

A page is found at its old place until its put has ended, and what becomes of a put that is broken off anywhere is settled like
any writer's: this daemon, its target or the meta server may die at any moment. One thread copies.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from dmp.metrics import DaemonMetrics
from stratakv.errors import StrataError
from stratakv.keys import pack_keys
from stratakv.layout import HEADER_BYTES, PageHeader
from stratakv.log import EventLogger
from stratakv.pool.dmp_client import ConnectionCache, DmpConnection
from stratakv.pool.errors import TransportError
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import (
    PUT_ID_BYTES,
    Done,
    Extent,
    Move,
    MovesTaken,
    PutEnd,
    PutGrant,
    PutRevoke,
    PutStart,
    ReportMoves,
    Segment,
)

BATCH_BYTES = 16 * 1024 * 1024
BATCH_PAGES = 512
WAITING_MAX = 65_536
"""Orders beyond are refused; the meta server forgets them after a while and gives them again."""
PUT_TIMEOUT_S = 30.0
COPY_TIMEOUT_S = 20.0
log = EventLogger("dmp.drain")

ReadPage = Callable[[Move], bytearray | None]
"""A copy of a page with its header; None if it is not there any more, or damaged. Blocks."""


@dataclass(frozen=True, slots=True)
class _Page:
    move: Move
    header: PageHeader
    data: memoryview


class Drainer:
    """One queue for the daemon's memory and its disk."""

    def __init__(self, client: MetaClient, connections: ConnectionCache, metrics: DaemonMetrics) -> None:
        self._client = client
        self._connections = connections
        self._metrics = metrics
        self._waiting: deque[tuple[Segment, ReadPage, Move]] = deque()
        self._wake = asyncio.Event()

    def send_away(self, source: Segment, read: ReadPage, moves: Iterable[Move]) -> None:
        """Copy these pages of one of the daemon's segments to others."""
        orders = [(source, read, move) for move in moves]
        room = WAITING_MAX - len(self._waiting)
        self._waiting.extend(orders[:room])
        if len(orders) > room:
            log.warning("orders_refused", orders=len(orders) - room)
            self._metrics.orders_refused(len(orders) - room)
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._wake.wait()
            if not self._waiting:
                self._wake.clear()
                continue
            source, read, moves = self._next_batch()
            sent = await self._send(source, read, moves)
            await self._report_failed(source, [move.extent for move in moves if move.extent not in sent])

    def _next_batch(self) -> tuple[Segment, ReadPage, list[Move]]:
        """Moves of one segment and one size of page."""
        source, read, first = self._waiting[0]
        moves: list[Move] = []
        while self._waiting and len(moves) < min(BATCH_PAGES, max(1, BATCH_BYTES // first.page_bytes)):
            segment, _, move = self._waiting[0]
            if segment is not source or move.page_bytes != first.page_bytes:
                break
            moves.append(self._waiting.popleft()[2])
        return source, read, moves

    async def _send(self, source: Segment, read: ReadPage, moves: Sequence[Move]) -> set[Extent]:
        """Those that are found elsewhere now."""
        groups: defaultdict[tuple[bytes, int], list[_Page]] = defaultdict(list)
        for page in await asyncio.to_thread(_read_all, read, moves):
            groups[page.header.namespace, page.move.owner].append(page)
        sent: set[Extent] = set()
        for (namespace, _), pages in groups.items():
            try:
                sent.update(page.move.extent for page in await self._put(source, namespace, pages))
            except StrataError as error:
                log.warning("pages_not_drained", node=source.node, pages=len(pages), reason=error.message)
        return sent

    async def _put(self, source: Segment, namespace: bytes, pages: Sequence[_Page]) -> list[_Page]:
        """One put; the pages that it moved. Raises StrataError."""
        put_id, page_bytes = os.urandom(PUT_ID_BYTES), pages[0].move.page_bytes
        keys = pack_keys([page.header.key for page in pages])
        request = PutStart(
            put_id, namespace, keys, page_bytes, 0, worker=source.node, timeout_s=PUT_TIMEOUT_S, copies_from=source.node
        )
        grant = await self._client.call(request, PutGrant)
        if grant.segment is None:
            return []
        wanted = [pages[i] for i in grant.wanted]
        try:
            extents = await asyncio.to_thread(self._copy, grant.segment, grant.term, put_id, wanted)
        except StrataError:
            await self._client.call(PutRevoke(put_id), Done)
            raise
        end = PutEnd(put_id, grant.segment.epoch, extents)
        await self._client.insist(end, Done, for_s=PUT_TIMEOUT_S)
        return wanted

    def _copy(self, target: Segment, term: int, put_id: bytes, pages: Sequence[_Page]) -> list[Extent]:
        """Data first, then headers that name the new places' generations. Blocks. Raises StrataError."""
        deadline = time.monotonic() + COPY_TIMEOUT_S
        connection = self._connections.get(target, deadline=deadline)
        try:
            return _write(connection, term, put_id, pages, deadline)
        except TransportError as error:
            self._connections.drop(connection, error.message)
            raise

    async def _report_failed(self, source: Segment, failed: list[Extent]) -> None:
        if not failed:
            return
        try:
            report = ReportMoves(source.node, source.epoch, source.node, source.epoch, [], failed)
            await self._client.call(report, MovesTaken)
        except StrataError as error:
            # Their orders are forgotten after a while.
            log.debug("failures_not_reported", node=source.node, reason=error.message)


def _read_all(read: ReadPage, moves: Sequence[Move]) -> list[_Page]:
    found = ((move, read(move)) for move in moves)
    return [
        _Page(move, PageHeader.unpack(memoryview(page)[:HEADER_BYTES]), memoryview(page))
        for move, page in found
        if page is not None
    ]


def _write(
    connection: DmpConnection, term: int, put_id: bytes, pages: Sequence[_Page], deadline: float
) -> list[Extent]:
    page_bytes = pages[0].move.page_bytes
    extents = connection.allocate(put_id, len(pages), page_bytes, PUT_TIMEOUT_S, deadline=deadline, term=term)
    placed = list(zip(pages, extents, strict=True))
    data = [(extent.offset + HEADER_BYTES, page.data[HEADER_BYTES:]) for page, extent in placed]
    connection.transport.write_batch(put_id, data, deadline=deadline)
    headers = [(extent.offset, replace(page.header, generation=extent.generation).pack()) for page, extent in placed]
    connection.transport.write_batch(put_id, headers, deadline=deadline)
    return extents
