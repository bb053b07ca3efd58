"""The processes of a run: PostgreSQL and two meta servers, which can be killed, frozen and started again; and one daemon's part."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stratakv import migrate
from stratakv.errors import StrataError
from stratakv.pool.fence import TermFence
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.meta_servers import leader_states
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import MetaSettings, PostgresSettings
from stratakv.wire import Extent, HeartbeatNode, NodeOrders, Registered, RegisterNode, Segment
from tests.kvcm_clients import KvcmProcess
from tests.meta_process import PAGE_BYTES
from tests.support import eventually_async

LEASE_S = 1.0
SERVERS = 2
DAEMON_PAGES = 10_000_000
HEARTBEAT_S = 0.2
START_TIMEOUT_S = 60.0


@dataclass
class Daemon:
    """A memory-pool daemon without memory: grants extents by put_id, and does what the leader orders."""

    client: MetaClient
    fence: TermFence
    segment: Segment = field(
        default_factory=lambda: Segment("n0", os.urandom(16), "127.0.0.1", 1, "stratakv-n0", DAEMON_PAGES * PAGE_BYTES)
    )
    open: dict[bytes, tuple[float, list[Extent]]] = field(default_factory=dict)
    """Puts that it does not know the outcome of: until when they may be written, and their extents."""
    committed: dict[bytes, list[Extent]] = field(default_factory=dict)
    next_page: int = 0

    def allocate(self, put_id: bytes, count: int, timeout_s: float, term: int) -> list[Extent] | None:
        """None for a grant of a leader of the past."""
        if not self.fence.admits(term):
            return None
        if put_id not in self.open:
            first, self.next_page = self.next_page, self.next_page + count
            extents = [Extent(page * PAGE_BYTES, page + 1) for page in range(first, self.next_page)]
            self.open[put_id] = asyncio.get_running_loop().time() + timeout_s, extents
        return self.open[put_id][1]

    async def run(self) -> None:
        """Register and report until cancelled."""
        is_known = False
        while True:
            try:
                if not is_known:
                    await self.client.call(RegisterNode(self.segment), Registered)
                is_known = await self.report()
            except StrataError:
                is_known = False
            await asyncio.sleep(HEARTBEAT_S)

    async def report(self) -> bool:
        """One heartbeat; False if the leader does not know this daemon."""
        now = asyncio.get_running_loop().time()
        undecided = [put_id for put_id, (until, _) in self.open.items() if until < now][:1000]
        used = sum(map(len, self.committed.values())) + sum(len(extents) for _, extents in self.open.values())
        used_bytes = used * PAGE_BYTES
        free_bytes = self.segment.size_bytes - used_bytes
        report = HeartbeatNode(self.segment.node, self.segment.epoch, used_bytes, free_bytes, undecided)
        orders = await self.client.call(report, NodeOrders)
        assert not orders.free, "nothing was removed that could be freed"
        # Two reports may be under way; they are answered alike.
        for put_id in set(orders.committed_puts) & set(self.open):
            self.committed[put_id] = self.open.pop(put_id)[1]
        for put_id in orders.void_puts:
            self.open.pop(put_id, None)
        return orders.known


class World:
    """All processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._postgres = EmbeddedPostgres(PostgresSettings(), directory / "pg", throw_away=True)
        # PostgreSQL ends with the thread that started it.
        self._thread = ThreadPoolExecutor(1)
        self.servers: list[KvcmProcess] = []

    @property
    def settings(self) -> MetaSettings:
        """Of clients that know all servers."""
        addresses = tuple(server.endpoint.removeprefix("tcp://") for server in self.servers)
        return MetaSettings(addresses=addresses, request_timeout_s=1.0)

    async def leader(self) -> int | None:
        """Which of the servers leads."""
        states = list((await leader_states(self.settings, None)).values())
        return next((i for i, state in enumerate(states) if state is not None and state.is_leader), None)

    async def has_leader(self) -> bool:
        return await self.leader() is not None

    def kill_server(self, number: int) -> None:
        self.servers[number].kill()

    def start_server(self, number: int) -> None:
        self.servers[number].launch()

    def freeze_server(self, number: int) -> None:
        self.servers[number].signal(signal.SIGSTOP)

    def wake_server(self, number: int) -> None:
        self.servers[number].signal(signal.SIGCONT)

    def kill_postgres(self) -> None:
        os.kill(self._postgres.pid, signal.SIGKILL)

    async def start_postgres(self) -> None:
        await self._run(self._postgres.restart)

    async def begin(self) -> None:
        """Start everything."""
        await self._run(self._postgres.start)
        url = self._postgres.database_url("postgres")
        await self._run(lambda: migrate.upgrade(url))
        for number in range(SERVERS):
            home = self._directory / str(number)
            home.mkdir(parents=True)
            server = KvcmProcess(url, home, leader_lease_s=LEASE_S, lease_s_max=1, heartbeat_s=0.5)
            server.launch()
            self.servers.append(server)
        await eventually_async(self.has_leader, timeout_s=START_TIMEOUT_S, what="a meta server leads")

    async def end(self) -> None:
        for server in self.servers:
            server.kill()
        await self._run(self._postgres.stop)
        self._thread.shutdown()

    async def _run(self, action: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, action)  # type: ignore[arg-type]


@asynccontextmanager
async def running_world(directory: Path) -> AsyncIterator[World]:
    """Everything started, and ended at the end."""
    world = World(directory)
    try:
        await world.begin()
        yield world
    finally:
        await world.end()
