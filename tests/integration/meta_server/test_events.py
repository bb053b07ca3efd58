"""Events over a real socket: a follower has what the server has, also after losses and restarts; slow ones hold nobody up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from meta_server import event_socket
from meta_server.events import ALIVE_S
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.follower import PoolFollower
from stratakv.pool.meta_client import MetaClient
from stratakv.settings import MetaSettings, PoolSettings, Secret
from stratakv.wire import PROTOCOL_VERSION, Flush, Flushed, Hello, Registered, RegisterNode, Welcome
from stratakv.wire_events import EventKind, decode_event
from tests.meta_process import NAMESPACE, MetaProcess, TestDaemon, connected, meta_server, new_keys, put
from tests.support import eventually_async

QUIET = {"heartbeat_s": 60.0}
"""Nobody sends heartbeats here."""
KEY_BYTES = 32
HELLO = Hello(PROTOCOL_VERSION, "test", "")


def blocks(*packed: bytes) -> set[tuple[bytes, bytes]]:
    keys = b"".join(packed)
    return {(NAMESPACE, keys[at : at + KEY_BYTES]) for at in range(0, len(keys), KEY_BYTES)}


@asynccontextmanager
async def following(client: MetaClient, credentials: PoolCredentials | None = None) -> AsyncIterator[PoolFollower]:
    follower = PoolFollower(client, credentials)
    task = asyncio.create_task(follower.run())
    try:
        yield follower
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def sees(follower: PoolFollower, expected: set[tuple[bytes, bytes]]) -> None:
    view = follower.view
    await eventually_async(lambda: view.is_whole and set(view.node_of) == expected, what="the view is the server's")


async def test_a_follower_sees_what_was_there_and_what_changes(migrated_url: str) -> None:
    async with meta_server(migrated_url, **QUIET) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "dmp-0", 4096)
        await daemon.register()
        first, second = new_keys(1500), new_keys(3)
        await put(client, daemon, first)
        async with following(client) as follower:
            await sees(follower, blocks(first))
            await put(client, daemon, second)
            await sees(follower, blocks(first, second))
            assert set(follower.view.node_of.values()) == {"dmp-0"}
            assert follower.view.is_up == {"dmp-0": True}
            await client.call(Flush(NAMESPACE), Flushed)
            await sees(follower, set())
            assert follower.view.gaps == 0
        await client.close()


async def test_a_follower_outlives_the_server_and_begins_anew_with_the_next(migrated_url: str, tmp_path: Path) -> None:
    server = MetaProcess(migrated_url, tmp_path, **QUIET)
    server.start()
    client = await connected(server.endpoint)
    daemon = TestDaemon(client, "dmp-0", 64)
    await daemon.register()
    keys = new_keys(5)
    await put(client, daemon, keys)
    async with following(client) as follower:
        await sees(follower, blocks(keys))
        server.kill()
        server.start()
        again = await connected(server.endpoint)
        await again.call(RegisterNode(daemon.segment), Registered)
        epoch = (await again.call(HELLO, Welcome)).epoch
        await again.close()
        await eventually_async(lambda: follower.view.epoch == epoch, what="the follower has found it")
        await sees(follower, blocks(keys))
    await client.close()
    server.kill()


async def test_only_those_with_the_secret_hear_events(
    migrated_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRATAKV_POOL_SECRET", "s" * 32)
    server = MetaProcess(migrated_url, tmp_path, **QUIET)
    server.start()
    credentials = PoolCredentials.from_settings(PoolSettings(secret=Secret("s" * 32)))
    client = MetaClient(MetaSettings(native_port=server.port), role="test", credentials=credentials)
    await client.start()
    await eventually_async(lambda: client.available, what="the server answers")
    context = zmq.asyncio.Context()
    welcome = await client.call(HELLO, Welcome)
    async with following(client, credentials) as follower:
        with context.socket(zmq.SUB) as stranger:
            stranger.subscribe(b"")
            stranger.connect(f"tcp://127.0.0.1:{welcome.events_port}")
            daemon = TestDaemon(client, "dmp-0", 64)
            await daemon.register()
            keys = new_keys(2)
            await put(client, daemon, keys)
            await sees(follower, blocks(keys))
            # The meta server says something every second.
            assert not await stranger.poll(int(1500 * ALIVE_S))
    context.term()
    await client.close()
    server.kill()


async def test_a_subscriber_that_does_not_read_loses_events_and_holds_nobody_up(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_socket, "EVENTS_QUEUED_MAX", 2)
    async with meta_server(migrated_url, **QUIET) as endpoint:
        client = await connected(endpoint)
        daemon = TestDaemon(client, "dmp-0", 1 << 20)
        welcome = await client.call(HELLO, Welcome)
        context = zmq.asyncio.Context()
        with context.socket(zmq.SUB) as slow:
            slow.setsockopt(zmq.RCVHWM, 1)
            slow.setsockopt(zmq.RCVBUF, 4096)
            slow.subscribe(b"")
            slow.connect(f"tcp://127.0.0.1:{welcome.events_port}")
            assert decode_event(await slow.recv()).kind is EventKind.ALIVE
            await daemon.register()
            async with following(client) as follower:
                keys = [new_keys(10_000) for _ in range(15)]
                for packed in keys:
                    await put(client, daemon, packed)
                await sees(follower, blocks(*keys))
            heard = [decode_event(await slow.recv()).sequence]
            while heard[-1] < 151:
                heard.append(decode_event(await slow.recv()).sequence)
            assert heard == sorted(heard)
            assert len(heard) < 151, "it has lost some, and sees that"
        context.term()
        await client.close()
