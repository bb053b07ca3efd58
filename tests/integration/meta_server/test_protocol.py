"""The wire between client and meta server: versions, malformed bytes, a server that is away."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio

from stratakv.errors import InvalidRequest, Unavailable
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.meta_errors import ProtocolMismatch
from stratakv.settings import MetaSettings
from stratakv.wire import GetStats, Hello, Match, MatchPrefix, Registered, RegisterNode, Segment, Stats, Welcome, encode
from tests.meta_process import NAMESPACE, MetaProcess, connected, meta_server
from tests.support import eventually_async, free_port


async def test_another_protocol_version_is_refused_with_both_named(migrated_url: str) -> None:
    async with meta_server(migrated_url) as endpoint:
        client = await connected(endpoint)
        with pytest.raises(ProtocolMismatch, match=r"speaks protocol 99, .* speaks 2"):
            await client.call(Hello(protocol=99, role="worker", name="w0"), Welcome)
        await client.close()


async def test_malformed_bytes_harm_nobody(migrated_url: str) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    async with meta_server(migrated_url) as endpoint:
        client = await connected(endpoint)
        context = zmq.asyncio.Context()
        raw = context.socket(zmq.DEALER)
        raw.connect(endpoint)
        whole = encode(MatchPrefix(NAMESPACE, os.urandom(320), 1.0))
        for _ in range(300):
            damaged = bytearray(whole)
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
            frames = [b"12345678", bytes(damaged[: dice.randrange(len(damaged) + 1)])]
            await raw.send_multipart(dice.choice([frames, [b"short", whole], [b""], frames * 2]))
        _, writer = await asyncio.open_connection("127.0.0.1", int(endpoint.rpartition(":")[2]))
        writer.write(dice.randbytes(4096))
        await writer.drain()
        writer.close()
        assert (await client.call(GetStats(), Stats)).blocks == 0
        for bad in (
            MatchPrefix(NAMESPACE, b"x" * 31),
            MatchPrefix(b"short", b""),
            RegisterNode(Segment("n\0", os.urandom(16), "h", 1, "s", 1)),
            RegisterNode(Segment("n", os.urandom(16), "h", 1, "s", (1 << 64) - 1)),
        ):
            with pytest.raises(InvalidRequest):
                await client.call(bad, Registered if isinstance(bad, RegisterNode) else Match)
        raw.close(0)
        context.term()
        await client.close()


async def test_a_server_that_is_away_costs_one_timeout_and_is_found_again(migrated_url: str, tmp_path: Path) -> None:
    server = MetaProcess(migrated_url, tmp_path)
    settings = MetaSettings(native_port=server.port, request_timeout_s=0.5)
    client = MetaClient(settings, role="test", name="c0")
    with pytest.raises(Unavailable):
        await client.call(GetStats(), Stats)
    assert not client.available
    with pytest.raises(Unavailable, match="does not answer"):
        await client.call(GetStats(), Stats)

    server.start()
    await eventually_async(lambda: client.available)
    assert client.welcome is not None
    first_epoch = client.welcome.epoch
    answers = await asyncio.gather(*(client.call(GetStats(), Stats) for _ in range(100)))
    assert len(answers) == 100

    server.kill()
    with pytest.raises(Unavailable, match="within"):
        await client.call(GetStats(), Stats)
    server.start()
    await eventually_async(lambda: client.available)
    assert client.welcome.epoch != first_epoch
    await client.close()
    assert server.stop() == 0


async def test_an_answer_that_cannot_be_read_is_an_error_of_that_call_only() -> None:
    port = free_port()
    context = zmq.asyncio.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"tcp://127.0.0.1:{port}")

    async def answer() -> None:
        welcome = encode(Welcome(protocol=1, server_version="test", epoch=bytes(16)))
        while True:
            who, request_id, payload = await router.recv_multipart()
            known = msgspec.msgpack.decode(payload)["type"] == "Hello"
            await router.send_multipart([who, request_id, welcome if known else b"\xc1"])

    task = asyncio.create_task(answer())
    client = await connected(f"tcp://127.0.0.1:{port}")
    with pytest.raises(Exception, match="cannot be read"):
        await client.call(GetStats(), Stats)
    assert client.available
    await client.close()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    router.close(0)
    context.term()
