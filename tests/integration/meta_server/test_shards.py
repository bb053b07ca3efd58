"""Two shards: each namespace is with one of the leaders, and a client of the pool finds it there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AsyncExitStack

import psycopg
import pytest

from stratakv import migrate
from stratakv.errors import InvalidRequest
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.shards import ShardedClient, all_shards, pool_client, shard_of
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import MetaSettings
from stratakv.wire import (
    Done,
    Flush,
    Flushed,
    GetStats,
    ListNamespaces,
    ListNodes,
    ListOwners,
    ListPages,
    Match,
    MatchPrefix,
    Namespaces,
    Nodes,
    OwnerLimit,
    OwnerStates,
    Pages,
    PutEnd,
    PutGrant,
    PutStart,
    SetOwnerLimits,
    Stats,
)
from tests.meta_process import PAGE_BYTES, TestDaemon, meta_server, new_keys


@pytest.fixture
def urls(postgres: EmbeddedPostgres) -> Iterator[list[str]]:
    """Of two migrated databases."""
    names = [f"shard_{os.urandom(8).hex()}" for _ in range(2)]
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        for name in names:
            connection.execute(f"CREATE DATABASE {name}".encode())
            migrate.upgrade(postgres.database_url(name))
        yield [postgres.database_url(name) for name in names]
        for name in names:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


async def test_a_namespace_is_written_found_and_dropped_on_its_own_shard(urls: list[str]) -> None:
    async with AsyncExitStack() as stack:
        endpoints = [await stack.enter_async_context(meta_server(url)) for url in urls]
        settings = MetaSettings(shards=tuple(endpoint.removeprefix("tcp://") for endpoint in endpoints))
        shards = [await stack.enter_async_context(MetaClient(shard)) for shard in all_shards(settings)]
        daemons = [TestDaemon(shard, f"n{number}", pages=100) for number, shard in enumerate(shards)]
        for daemon in daemons:
            await daemon.register()
        pool = pool_client(settings)
        assert isinstance(pool, ShardedClient)
        await stack.enter_async_context(pool)
        namespaces = [bytes([number]) * 16 for number in range(6)]
        of = [shard_of(namespace, 2) for namespace in namespaces]
        assert set(of) == {0, 1}
        keys = {namespace: new_keys(3) for namespace in namespaces}
        for namespace, shard in zip(namespaces, of, strict=True):
            put_id = os.urandom(16)
            request = PutStart(put_id, namespace, keys[namespace], PAGE_BYTES, 16, owner=7)
            grant = await pool.call(request, PutGrant)
            assert grant.segment is not None
            assert grant.segment.node == f"n{shard}"
            end = PutEnd(put_id, grant.segment.epoch, daemons[shard].allocate(3))
            await shards[shard].call(end, Done)
        for namespace, shard in zip(namespaces, of, strict=True):
            lookup = MatchPrefix(namespace, keys[namespace])
            assert (await pool.call(lookup, Match)).num_blocks == 3
            assert (await shards[1 - shard].call(lookup, Match)).num_blocks == 0
        assert sorted(n.segment.node for n in (await pool.call(ListNodes(), Nodes)).nodes) == ["n0", "n1"]
        assert len((await pool.call(ListNamespaces(), Namespaces)).namespaces) == 6
        assert (await pool.call(GetStats(), Stats)).blocks == 18
        acme = OwnerLimit(7, "acme", 100 * PAGE_BYTES)
        await pool.call(SetOwnerLimits([acme]), Done)
        owners = (await pool.call(ListOwners(), OwnerStates)).owners
        assert [owner.limit for owner in owners] == [acme, acme], "each shard holds an owner to its limit"
        assert sum(owner.memory_bytes for owner in owners) == 18 * PAGE_BYTES
        assert len((await pool.call(ListPages("n1"), Pages)).pages) == 3 * of.count(1)
        with pytest.raises(InvalidRequest):
            await pool.call(ListPages("n2"), Pages)
        assert (await pool.call(Flush(namespaces[0]), Flushed)).num_blocks == 3
        assert (await pool.call(Flush(), Flushed)).num_blocks == 15
