"""The disk tier of a daemon as the meta server sees it: a segment of its own, whose pages come from the daemon's memory.

At every start each page is read and checked before the disk registers, and told to the meta server before it can be found.
Afterwards: heartbeats, orders, a slow check of everything (scrub), and files that are mostly out of use given up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence

from dmp.disk.mover import Mover
from dmp.disk.store import DiskStore
from dmp.drain import Drainer
from dmp.metrics import DaemonMetrics
from stratakv.errors import StrataError
from stratakv.keys import BlockKey, Namespace
from stratakv.log import EventLogger
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import (
    Done,
    Extent,
    HeartbeatNode,
    NodeOrders,
    Place,
    Reconciled,
    ReconcilePages,
    Registered,
    RegisterNode,
    ReportCorrupt,
    Segment,
)

RETRY_S_MIN = 0.2
RETRY_S_MAX = 2.0
FREED_PER_HEARTBEAT_MAX = 65_536
RECONCILED_AT_ONCE = 16_384
UPKEEP_S = 5.0
"""How often files to give up are looked for, and the scrub's pause at the end of a round."""
log = EventLogger("dmp.disk")


class DiskNode:
    """Keeps one disk known to the meta server."""

    def __init__(
        self,
        client: MetaClient,
        segment: Segment,
        store: DiskStore,
        mover: Mover,
        drainer: Drainer,
        scrub_bytes_per_s: int,
        metrics: DaemonMetrics,
    ) -> None:
        self._client = client
        self._segment = segment
        self._store = store
        self._mover = mover
        self._drainer = drainer
        self._scrub_bytes_per_s = scrub_bytes_per_s
        self._metrics = metrics
        self._stopping = False

    async def run(self) -> None:
        """Recover, then serve until cancelled."""
        try:
            await asyncio.to_thread(self._store.recover, lambda: self._stopping)
        finally:
            self._stopping = True
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._report())
            tasks.create_task(self._mover.run())
            tasks.create_task(self._compact())
            if self._scrub_bytes_per_s:
                tasks.create_task(self._scrub())

    async def _report(self) -> None:
        retry_s = RETRY_S_MIN
        while True:
            try:
                registered = await self._client.call(RegisterNode(self._segment), Registered)
                await self._reconcile()
                log.info("disk_registered", node=self._segment.node, pages=self._store.num_pages)
                retry_s = RETRY_S_MIN
                await self._beat_until_unknown(registered.heartbeat_s)
            except StrataError as error:
                log.warning("meta_server_unreachable", node=self._segment.node, reason=error.message)
                await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))
                retry_s = min(RETRY_S_MAX, retry_s * 2)

    async def _beat_until_unknown(self, heartbeat_s: float) -> None:
        while True:
            if not await self._beat():
                break
            await asyncio.sleep(heartbeat_s)

    async def _reconcile(self) -> None:
        extents = self._store.extents()
        for part, is_first, is_last in _parts(extents):
            request = ReconcilePages(self._segment.node, self._segment.epoch, part, is_first, is_last)
            answer = await self._client.call(request, Reconciled)
            await asyncio.to_thread(self._store.free, answer.unknown)

    async def _beat(self) -> bool:
        """One heartbeat; False if the meta server has to be told everything again."""
        store, segment = self._store, self._segment
        freed = store.freed(FREED_PER_HEARTBEAT_MAX)
        used_bytes = store.used_bytes
        report = HeartbeatNode(
            node=segment.node,
            epoch=segment.epoch,
            used_bytes=used_bytes,
            free_bytes=max(0, segment.size_bytes - used_bytes),
            freed=freed,
            read_only=store.is_read_only,
        )
        orders = await self._client.call(report, NodeOrders)
        if not orders.known:
            return False
        store.confirm_freed(freed)
        if orders.free:
            await asyncio.to_thread(store.free, orders.free)
        self._mover.promote(orders.moves)
        self._drainer.send_away(segment, lambda move: store.read(move.extent), orders.moves_away)
        return True

    async def _compact(self) -> None:
        while True:
            self._mover.compact(self._store.sparse())
            await asyncio.sleep(UPKEEP_S)

    async def _scrub(self) -> None:
        while True:
            for extent in self._store.extents():
                page = self._store.page(extent)
                if page is None:
                    continue
                if await asyncio.to_thread(self._store.read, extent) is None and self._store.page(extent) is not None:
                    log.warning("page_damaged_on_disk", node=self._segment.node, offset=extent.offset)
                    await self._tell_corrupt(extent, page.namespace, page.key)
                self._metrics.scrubbed(page.page_bytes)
                await asyncio.sleep(page.page_bytes / self._scrub_bytes_per_s)
            await asyncio.sleep(UPKEEP_S)

    async def _tell_corrupt(self, extent: Extent, namespace: bytes, key: bytes) -> None:
        place = Place(self._segment.node, extent.offset, extent.generation)
        try:
            await self._client.call(ReportCorrupt(Namespace(namespace), BlockKey(key), place), Done)
        except StrataError as error:
            log.debug("not_told", reason=error.message)


def _parts(extents: Sequence[Extent]) -> Iterator[tuple[list[Extent], bool, bool]]:
    """Parts of a list, at least one, each with whether it is the first and the last."""
    for start in range(0, max(1, len(extents)), RECONCILED_AT_ONCE):
        part = list(extents[start : start + RECONCILED_AT_ONCE])
        yield part, start == 0, start + RECONCILED_AT_ONCE >= len(extents)
