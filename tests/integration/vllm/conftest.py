"""A pool of one meta server and one daemon, and instances of the connector's two sides."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg
import pytest

from stratakv.errors import StrataError
from stratakv.layout import HEADER_BYTES
from stratakv.migrate import upgrade
from stratakv.pool.dmp_client import connect
from stratakv.pool.meta_client import MetaClient
from stratakv.postgres import EmbeddedPostgres
from stratakv.wire import GetStats, ListNodes, Nodes, Place, Stats
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.vllm.stand_in import Instance
from tests.meta_process import MetaProcess
from tests.support import eventually


@dataclass
class Pool:
    """One meta server, one daemon."""

    endpoint: str
    daemon: DaemonProcess

    def stats(self) -> Stats:
        async def ask() -> Stats:
            async with MetaClient(self.endpoint) as client:
                return await client.call(GetStats(), Stats)

        return asyncio.run(ask())

    def has_daemon(self) -> bool:
        async def ask() -> bool:
            async with MetaClient(self.endpoint) as client:
                return bool((await client.call(ListNodes(), Nodes)).nodes)

        try:
            return asyncio.run(ask())
        except StrataError:
            return False

    def damage(self, place: Place) -> None:
        """Change a byte of a page's first layer."""
        connection = connect(self.daemon.segment, deadline=time.monotonic() + 5)
        mapping = connection.transport.mapping()
        assert mapping is not None
        mapping[place.offset + HEADER_BYTES + 100] ^= 1
        connection.close()

    def assert_at_rest(self) -> None:
        """No lease, no unfinished put."""
        eventually(lambda: self.stats().leases == 0 and self.stats().puts_pending == 0, what="everything given back")


@pytest.fixture(scope="package")
def pool(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE vllm_sides")
    upgrade(postgres.database_url("vllm_sides"))
    directory = tmp_path_factory.mktemp("pool")
    meta = MetaProcess(postgres.database_url("vllm_sides"), directory)
    meta.start()
    with DaemonProcess(directory / "dmp.log", node="dmp-v", meta_port=meta.port) as daemon:
        pool = Pool(meta.endpoint, daemon)
        eventually(pool.has_daemon, what="the daemon to register")
        yield pool
    meta.stop()


Make = Callable[..., Instance]


@pytest.fixture
def make(pool: Pool) -> Iterator[Make]:
    """Makes instances; at the end nothing of theirs may be left in the pool's books."""
    made: list[Instance] = []

    def instance(**options: object) -> Instance:
        made.append(Instance(pool.endpoint, **options))  # type: ignore[arg-type]
        return made[-1]

    yield instance
    for one in made:
        one.close()
    pool.assert_at_rest()
