"""A real meta server for tests: as a process that can be killed, or on the test's own event loop; and daemons for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from meta_server.server import serve
from stratakv.pool.meta_client import MetaClient
from stratakv.settings import DatabaseSettings, MetaSettings, Secret, Settings
from stratakv.wire import (
    Done,
    Extent,
    HeartbeatNode,
    NodeOrders,
    PutEnd,
    PutGrant,
    PutStart,
    Registered,
    RegisterNode,
    Segment,
)
from tests.service_process import ServiceProcess
from tests.support import eventually_async, free_port

ROOT = Path(__file__).parents[1]
PAGE_BYTES = 4096
NAMESPACE = b"n" * 16
START_TIMEOUT_S = 30.0


def new_keys(count: int) -> bytes:
    return os.urandom(32 * count)


class MetaProcess(ServiceProcess):
    """`python -m meta_server` on a database."""

    def __init__(self, url: str, directory: Path, **settings: object) -> None:
        self.port = free_port()
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        env = {"STRATAKV_DATABASE_URL": url}
        super().__init__("meta_server", [f"--native-port={self.port}", *flags], env, directory / "meta.log")

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def run(self) -> tuple[int, str]:
        """Run a server that is expected to end by itself; exit status and what it said."""
        self.start()
        return self.wait(), self.log()


@asynccontextmanager
async def meta_server(url: str, **settings: object) -> AsyncIterator[str]:
    """A meta server on this event loop; its endpoint."""
    meta = MetaSettings(native_port=0, **settings)  # type: ignore[arg-type]
    stop, endpoint = asyncio.Event(), asyncio.get_running_loop().create_future()
    whole = Settings(database=DatabaseSettings(url=Secret(url)), meta=meta)
    server = asyncio.create_task(serve(whole, stop, endpoint.set_result))
    await asyncio.wait([server, endpoint], return_when=asyncio.FIRST_COMPLETED)
    if server.done():
        await server
    try:
        yield await endpoint
    finally:
        stop.set()
        await server


class TestDaemon:
    """A memory-pool daemon without memory: registers, reports, hands out extents."""

    __test__ = False

    def __init__(self, client: MetaClient, name: str, pages: int) -> None:
        self.segment = Segment(name, os.urandom(16), "127.0.0.1", 1, f"stratakv-{name}", pages * PAGE_BYTES)
        self._client = client
        self._next_offset = 0
        self.held: set[Extent] = set()
        self.freed: list[Extent] = []
        self.undecided: list[bytes] = []

    async def register(self) -> Registered:
        return await self._client.call(RegisterNode(self.segment), Registered)

    async def heartbeat(self) -> NodeOrders:
        used = len(self.held) * PAGE_BYTES
        free = self.segment.size_bytes - used
        report = HeartbeatNode(self.segment.node, self.segment.epoch, used, free, self.undecided, self.freed)
        orders = await self._client.call(report, NodeOrders)
        self.freed = orders.free
        self.held.difference_update(orders.free)
        return orders

    def allocate(self, count: int) -> list[Extent]:
        offsets = [(self._next_offset + i) * PAGE_BYTES % self.segment.size_bytes for i in range(count)]
        self._next_offset += count
        extents = [Extent(offset, self._next_offset) for offset in offsets]
        self.held.update(extents)
        return extents


async def start_put(client: MetaClient, keys: bytes, put_id: bytes, timeout_s: float = 30.0) -> PutGrant:
    return await client.call(PutStart(put_id, NAMESPACE, keys, PAGE_BYTES, 16, timeout_s=timeout_s), PutGrant)


async def put(client: MetaClient, daemon: TestDaemon, keys: bytes) -> PutEnd:
    """A whole put; the message that finished it."""
    put_id = os.urandom(16)
    grant = await start_put(client, keys, put_id)
    assert grant.segment is not None
    end = PutEnd(put_id, grant.segment.epoch, daemon.allocate(len(grant.wanted)))
    await client.call(end, Done)
    return end


async def connected(endpoint: str) -> MetaClient:
    """A client of a server that may still be starting."""
    client = MetaClient(endpoint, role="test", name="test")
    await client.start()
    await eventually_async(lambda: client.available, timeout_s=START_TIMEOUT_S, what="meta server answers")
    return client
