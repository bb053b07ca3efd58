"""kill -9 of the meta server: nothing acknowledged is lost, nothing unfinished is found, nothing evicted comes back."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from stratakv.errors import StrataError
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.meta_errors import PutUnknown
from stratakv.wire import Done, Flush, Flushed, Match, MatchPrefix, PutEnd, PutRevoke
from tests.meta_process import NAMESPACE, MetaProcess, TestDaemon, connected, new_keys, put, start_put
from tests.support import eventually_async


async def count_found(client: MetaClient, keys: bytes) -> int:
    return (await client.call(MatchPrefix(NAMESPACE, keys), Match)).num_blocks


async def test_what_was_acknowledged_is_found_and_what_was_not_finished_is_not(
    migrated_url: str, tmp_path: Path
) -> None:
    server = MetaProcess(migrated_url, tmp_path, lease_s_max=1)
    server.start()
    client = await connected(server.endpoint)
    daemon = TestDaemon(client, "n0", pages=100_000)
    await daemon.register()
    pending_id, pending_keys = os.urandom(16), new_keys(5)
    grant = await start_put(client, pending_keys, pending_id)
    await put(client, daemon, new_keys(3))
    acknowledged: list[bytes] = []

    async def write() -> None:
        while True:
            keys = new_keys(20)
            try:
                await put(client, daemon, keys)
            except StrataError:
                return
            acknowledged.append(keys)

    writers = [asyncio.create_task(write()) for _ in range(4)]
    await eventually_async(lambda: len(acknowledged) >= 100)
    server.kill()
    await asyncio.gather(*writers)

    server.start()
    await client.close()
    client = daemon._client = await connected(server.endpoint)
    assert [await count_found(client, keys) for keys in acknowledged[:3]] == [0, 0, 0], "its daemon is not heard yet"
    assert (await daemon.heartbeat()).known
    assert [await count_found(client, keys) for keys in acknowledged] == [20] * len(acknowledged)
    assert await count_found(client, pending_keys) == 0

    again = await start_put(client, pending_keys, pending_id)
    assert again.term > grant.term, "a new leader"
    assert replace(again, term=grant.term) == grant, "a put survives the restart"
    await client.call(PutEnd(pending_id, daemon.segment.epoch, daemon.allocate(5)), Done)
    assert await count_found(client, pending_keys) == 5
    await client.close()
    assert server.stop() == 0


async def test_what_was_flushed_stays_away_and_is_ordered_free_until_it_is(migrated_url: str, tmp_path: Path) -> None:
    server = MetaProcess(migrated_url, tmp_path, lease_s_max=0.2)
    server.start()
    client = await connected(server.endpoint)
    daemon = TestDaemon(client, "n0", pages=1000)
    await daemon.register()
    flushed, kept = new_keys(4), new_keys(2)
    extents = (await put(client, daemon, flushed)).extents
    assert await client.call(Flush(), Flushed) == Flushed(num_blocks=4)
    await put(client, daemon, kept)
    server.kill()

    server.start()
    await client.close()
    client = daemon._client = await connected(server.endpoint)
    await daemon.heartbeat()
    assert (await count_found(client, flushed), await count_found(client, kept)) == (0, 2)

    async def ordered_again() -> bool:
        daemon.freed = []
        return (await daemon.heartbeat()).free == extents

    await eventually_async(ordered_again, what="the flushed pages are ordered free")
    assert (await daemon.heartbeat()).free == [], "reported freed in this heartbeat"
    await client.close()
    assert server.stop() == 0


async def test_a_restarted_daemon_voids_its_places_and_its_puts(migrated_url: str, tmp_path: Path) -> None:
    server = MetaProcess(migrated_url, tmp_path)
    server.start()
    client = await connected(server.endpoint)
    old = TestDaemon(client, "n0", pages=100)
    await old.register()
    keys, put_id = new_keys(3), os.urandom(16)
    await put(client, old, keys)
    await start_put(client, new_keys(2), put_id)
    new = TestDaemon(client, "n0", pages=100)
    await new.register()
    assert await count_found(client, keys) == 0
    with pytest.raises(PutUnknown):
        await client.call(PutEnd(put_id, old.segment.epoch, old.allocate(2)), Done)
    assert not (await old.heartbeat()).known
    with pytest.raises(StrataError, match="epoch is over"):
        await old.register()
    server.kill()

    server.start()
    await client.close()
    client = old._client = new._client = await connected(server.endpoint)
    await new.heartbeat()
    assert await count_found(client, keys) == 0
    with pytest.raises(StrataError, match="epoch is over"):
        await old.register()
    await client.call(PutRevoke(put_id), Done)
    await client.close()
    assert server.stop() == 0
