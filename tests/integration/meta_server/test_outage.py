"""While PostgreSQL is away lookups go on, writes are told to come back, and nothing is decided twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from stratakv.errors import Unavailable
from stratakv.pool.meta_errors import PutFinished
from stratakv.wire import Done, Match, MatchPrefix, PutEnd, PutRevoke
from tests.meta_process import NAMESPACE, TestDaemon, connected, meta_server, new_keys, put, start_put
from tests.support import eventually_async


@contextmanager
def database_away(url: str) -> Iterator[None]:
    """Nobody can connect, and those who had are thrown out."""
    name = str(conninfo_to_dict(url)["dbname"])
    with psycopg.connect(make_conninfo(url, dbname="postgres"), autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        yield
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


async def test_lookups_go_on_and_a_put_end_succeeds_when_the_database_is_back(migrated_url: str) -> None:
    async with meta_server(migrated_url) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "n0", pages=1000)
        await daemon.register()
        keys, late_keys, late_id = new_keys(3), new_keys(2), os.urandom(16)
        await put(client, daemon, keys)
        await start_put(client, late_keys, late_id)
        late = PutEnd(late_id, daemon.segment.epoch, daemon.allocate(2))
        with database_away(migrated_url):
            with pytest.raises(Unavailable):
                await client.call(late, Done)
            assert (await client.call(MatchPrefix(NAMESPACE, keys, 1.0), Match)).num_blocks == 3
            assert (await client.call(MatchPrefix(NAMESPACE, late_keys), Match)).num_blocks == 0
            with pytest.raises(Unavailable):
                await client.call(late, Done)

        async def ended() -> bool:
            try:
                await client.call(late, Done)
            except Unavailable:
                return False
            return True

        await eventually_async(ended)
        assert (await client.call(MatchPrefix(NAMESPACE, late_keys), Match)).num_blocks == 2
        with pytest.raises(PutFinished):
            await client.call(PutRevoke(late_id), Done)
        await client.close()


async def test_a_put_that_expired_meanwhile_is_void_when_the_database_is_back(migrated_url: str) -> None:
    async with meta_server(migrated_url) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "n0", pages=1000)
        await daemon.register()
        keys, put_id = new_keys(2), os.urandom(16)
        await start_put(client, keys, put_id, timeout_s=0.3)
        daemon.undecided = [put_id]
        assert (await daemon.heartbeat()).void_puts == [], "not decided yet"
        with database_away(migrated_url), pytest.raises(Unavailable):
            await client.call(PutEnd(put_id, daemon.segment.epoch, daemon.allocate(2)), Done)

        async def void() -> bool:
            return (await daemon.heartbeat()).void_puts == [put_id]

        await eventually_async(void)
        assert (await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks == 0
        await client.close()
