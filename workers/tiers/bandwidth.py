"""How fast pages come from the host's own daemon and from another one, tried once at a worker's start.

Pages of a put of its own are written, read back and given up: nobody can ever find them. Called by `workers.warmup`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from stratakv.errors import StrataError
from stratakv.keys import KEY_BYTES, BlockKey, Namespace, pack_keys
from stratakv.layout import KVLayout
from stratakv.log import EventLogger
from stratakv.pool.dmp_client import ConnectionCache
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.pages import PageMemory, PageReader, PageWriter
from stratakv.wire import PUT_ID_BYTES, Done, ListNodes, Nodes, PutGrant, PutRevoke, PutStart
from workers.engine.connector import Tier
from workers.engine.reservations import Reservations
from workers.tiers.window import OpenWindow

log = EventLogger("workers.tiers.bandwidth")

MEASURED_BYTES = 64 * 1024 * 1024
L1_SHARE_MAX = 0.25
"""Of L1's blocks, between which and the daemon bytes are moved."""
READS = 2
"""The faster one counts: the first one maps the memory."""
MEASURE_S_MAX = 2.0
"""Of one daemon."""


@dataclass(frozen=True, slots=True)
class BandwidthProbe:
    """One worker's way to the daemons."""

    layout: KVLayout
    namespace: Namespace
    worker: str
    node: str | None
    meta: MetaClient
    connections: ConnectionCache
    open_window: OpenWindow
    reservations: Reservations
    num_l1_blocks: int

    async def measure(self) -> dict[str, float]:
        """Bytes per second, of the tiers that could be tried."""
        wanted = min(MEASURED_BYTES // self.layout.data_bytes, int(self.num_l1_blocks * L1_SHARE_MAX))
        blocks = await asyncio.wrap_future(self.reservations.reserve(max(1, wanted)))
        rates: dict[str, float] = {}
        try:
            memory = self.open_window(blocks).memory
            for tier, node in (await self._nodes()).items():
                seconds = await self._try(node, memory)
                if seconds is not None:
                    rates[tier.value] = len(blocks) * self.layout.data_bytes / seconds
        except StrataError as error:
            log.info("bandwidth_not_measured", error=error.message)
        finally:
            self.reservations.release(blocks)
        return rates

    async def _nodes(self) -> Mapping[Tier, str]:
        """The daemon to try for each tier."""
        known = await self.meta.call(ListNodes(), Nodes)
        memory = [n.segment.node for n in known.nodes if not n.segment.is_disk]
        return {Tier.L2 if node == self.node else Tier.POOL: node for node in memory}

    async def _try(self, node: str, memory: PageMemory) -> float | None:
        """Seconds that reading the pages took; None if that daemon has no room for them now."""
        keys = [BlockKey(os.urandom(KEY_BYTES)) for _ in memory.rows]
        put_id = os.urandom(PUT_ID_BYTES)
        start = PutStart(
            put_id=put_id,
            namespace=self.namespace,
            keys=pack_keys(keys),
            page_bytes=self.layout.page_bytes,
            block_size=self.layout.page_tokens,
            prefer_node=node,
            worker=self.worker,
            timeout_s=MEASURE_S_MAX,
        )
        grant = await self.meta.call(start, PutGrant)
        try:
            if grant.segment is None or grant.segment.node != node:
                return None
            return await asyncio.to_thread(self._move, put_id, grant, keys, memory)
        finally:
            await self.meta.call(PutRevoke(put_id), Done)

    def _move(self, put_id: bytes, grant: PutGrant, keys: list[BlockKey], memory: PageMemory) -> float:
        assert grant.segment is not None
        deadline = time.monotonic() + MEASURE_S_MAX
        layers = range(len(self.layout.layers))
        connection = self.connections.get(grant.segment, deadline=deadline)
        extents = connection.allocate(
            put_id, len(keys), self.layout.page_bytes, MEASURE_S_MAX, deadline=deadline, term=grant.term
        )
        try:
            writing = PageWriter(self.layout, self.namespace).begin(connection, put_id, extents, keys)
            writing.write_layers(layers, memory, deadline=deadline)
            reading = PageReader(self.layout, self.namespace).without_headers(connection, extents)
            reading.expect(layers, writing.checksums(layers))
            taken_s: list[float] = []
            for _ in range(READS):
                started = time.monotonic()
                reading.read_layers(layers, memory, deadline=deadline)
                taken_s.append(time.monotonic() - started)
        finally:
            connection.release(put_id, deadline=deadline)
        return min(taken_s)
