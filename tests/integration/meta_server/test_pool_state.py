"""Room, reclaim, presence of daemons and workers, and the tables that people read."""

from __future__ import annotations

import os

import psycopg
import pytest

from stratakv.errors import InvalidRequest
from stratakv.pool.meta_errors import PoolFull, PutUnknown, StaleEpoch
from stratakv.wire import (
    Done,
    Extent,
    Flush,
    Flushed,
    GetStats,
    HeartbeatWorker,
    ListNodes,
    ListWorkers,
    Match,
    MatchPrefix,
    Nodes,
    Place,
    PutEnd,
    PutGrant,
    Registered,
    RegisterWorker,
    ReleaseLease,
    ReportCorrupt,
    Stats,
    WorkerInfo,
    WorkerLoad,
    WorkerOrders,
    WorkerRole,
    Workers,
)
from tests.meta_process import NAMESPACE, TestDaemon, connected, meta_server, new_keys, put, start_put
from tests.support import eventually_async


async def test_a_full_segment_reclaims_its_coldest_unleased_pages(migrated_url: str) -> None:
    async with meta_server(migrated_url, heartbeat_s=5.0) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "n0", pages=10)
        await daemon.register()
        leased, cold, warm = new_keys(2), new_keys(4), new_keys(4)
        for keys in (leased, cold, warm):
            await put(client, daemon, keys)
        lease = await client.call(MatchPrefix(NAMESPACE, leased, 60.0), Match)
        with pytest.raises(PoolFull):
            await start_put(client, new_keys(3), os.urandom(16))

        async def freed() -> bool:
            await daemon.heartbeat()
            return len(daemon.held) <= 7

        await eventually_async(freed)
        found = [(await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks for keys in (leased, cold, warm)]
        assert found == [2, 1, 4], "leased pages stay, and of the others the coldest went first"
        await daemon.heartbeat()
        assert (await start_put(client, new_keys(3), os.urandom(16))).wanted == [0, 1, 2]
        await client.call(ReleaseLease(lease.lease_id), Done)
        await client.close()


async def test_what_fits_is_granted_and_what_others_write_is_not_asked_for(migrated_url: str) -> None:
    async with meta_server(migrated_url) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "n0", pages=6)
        await daemon.register()
        there, pending, more = new_keys(2), new_keys(2), new_keys(4)
        await put(client, daemon, there)
        assert await start_put(client, there, os.urandom(16)) == PutGrant(wanted=[])
        assert (await start_put(client, there + pending, os.urandom(16))).wanted == [2, 3]
        assert (await start_put(client, there + pending + more, os.urandom(16))).wanted == [4, 5]
        await client.close()


async def test_a_put_end_that_does_not_fit_its_grant_changes_nothing(migrated_url: str) -> None:
    async with meta_server(migrated_url) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "n0", pages=100)
        await daemon.register()
        keys, put_id = new_keys(2), os.urandom(16)
        await start_put(client, keys, put_id)
        good, epoch = daemon.allocate(2), daemon.segment.epoch
        with pytest.raises(StaleEpoch):
            await client.call(PutEnd(put_id, os.urandom(16), good), Done)
        for extents in (good[:1], [good[0], good[0]], [good[0], Extent(daemon.segment.size_bytes, 1)]):
            with pytest.raises(InvalidRequest):
                await client.call(PutEnd(put_id, epoch, extents), Done)
        with pytest.raises(PutUnknown):
            await client.call(PutEnd(os.urandom(16), epoch, good), Done)
        assert (await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks == 0
        for _ in range(2):
            await client.call(PutEnd(put_id, epoch, good), Done)
        assert (await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks == 2
        await client.close()


async def test_a_corrupt_page_is_found_no_more(migrated_url: str) -> None:
    async with meta_server(migrated_url) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "n0", pages=100)
        await daemon.register()
        keys = new_keys(3)
        end = await put(client, daemon, keys)
        wrong = Place("n0", end.extents[1].offset, 99)
        await client.call(ReportCorrupt(NAMESPACE, keys[32:64], wrong), Done)
        assert (await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks == 3, "not the page that is there"
        place = Place("n0", end.extents[1].offset, end.extents[1].generation)
        await client.call(ReportCorrupt(NAMESPACE, keys[32:64], place), Done)
        assert (await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks == 1
        await client.close()


async def test_a_silent_daemon_is_not_named_until_it_is_heard_again(migrated_url: str) -> None:
    async with meta_server(migrated_url, heartbeat_s=0.1) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "n0", pages=100)
        assert (await daemon.register()).heartbeat_s == 0.1
        keys = new_keys(3)
        await put(client, daemon, keys)

        async def gone() -> bool:
            return (await client.call(ListNodes(), Nodes)).nodes == []

        await eventually_async(gone)
        assert (await client.call(MatchPrefix(NAMESPACE, keys, 1.0), Match)).num_blocks == 0
        await daemon.heartbeat()
        match = await client.call(MatchPrefix(NAMESPACE, keys, 1.0), Match)
        assert (match.num_blocks, match.segments) == (3, [daemon.segment])
        await client.close()


async def test_a_daemon_that_never_comes_back_is_forgotten_with_what_was_in_its_memory(migrated_url: str) -> None:
    async with meta_server(migrated_url, heartbeat_s=0.1, node_silence_s_max=1.0) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "n0", pages=100)
        await daemon.register()
        await put(client, daemon, new_keys(3))
        await start_put(client, new_keys(2), pending := os.urandom(16))
        assert (await client.call(GetStats(), Stats)).bytes_committed > 0

        async def is_forgotten() -> bool:
            stats = await client.call(GetStats(), Stats)
            return (stats.blocks, stats.bytes_committed, stats.puts_pending) == (0, 0, 0)

        await eventually_async(is_forgotten)
        with pytest.raises(StaleEpoch):
            await daemon.register()
        with pytest.raises(PutUnknown):
            await client.call(PutEnd(pending, daemon.segment.epoch, daemon.allocate(2)), Done)
        again = TestDaemon(client, "n0", pages=100)
        await again.register()
        await put(client, again, new_keys(4))
        await client.close()
    async with meta_server(migrated_url, heartbeat_s=0.1) as endpoint:
        client = await connected(endpoint)
        assert (await client.call(GetStats(), Stats)).blocks == 4
        await client.close()


async def test_workers_are_listed_while_their_heartbeats_arrive(migrated_url: str) -> None:
    async with meta_server(migrated_url, heartbeat_s=0.1) as endpoint:
        client = await connected(endpoint)
        info = WorkerInfo("w0", os.urandom(16), "http://127.0.0.1:1", WorkerRole.BOTH, "m", NAMESPACE, 16, 4096)
        beat = HeartbeatWorker("w0", info.epoch, WorkerLoad(running=3))
        assert not (await client.call(beat, WorkerOrders)).known
        await client.call(RegisterWorker(info), Registered)
        assert (await client.call(beat, WorkerOrders)).known
        (state,) = (await client.call(ListWorkers(), Workers)).workers
        assert (state.info, state.load.running) == (info, 3)

        async def gone() -> bool:
            return (await client.call(ListWorkers(), Workers)).workers == []

        await eventually_async(gone)
        await client.close()


async def test_the_tables_follow_the_index(migrated_url: str) -> None:
    def rows(table: str) -> int:
        with psycopg.connect(migrated_url) as connection:
            row = connection.execute(f"SELECT count(*) FROM stratakv.{table}").fetchone()  # type: ignore[arg-type]
            assert row is not None
            return int(row[0])

    async with meta_server(migrated_url) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "n0", pages=100)
        await daemon.register()
        keys = new_keys(7)
        end = await put(client, daemon, keys)
        await eventually_async(lambda: (rows("blocks"), rows("replicas")) == (7, 7))
        with psycopg.connect(migrated_url) as connection:
            found = connection.execute(
                "SELECT key, page_offset, generation FROM stratakv.replicas ORDER BY put_position"
            ).fetchall()
        assert b"".join(row[0] for row in found) == keys
        assert [Extent(row[1], row[2]) for row in found] == end.extents
        await client.call(Flush(), Flushed)
        await eventually_async(lambda: (rows("blocks"), rows("replicas")) == (0, 0))
        assert (await client.call(GetStats(), Stats)).blocks == 0
        await client.close()
