"""Events on the KVCM ports: both transports tell of the same changes, in order, and the snapshot is what they lead to."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from stratakv.wire import Flush, Flushed
from tests.kvcm_clients import TRANSPORTS, GrpcClient, HttpClient, KvcmProcess, running
from tests.meta_process import NAMESPACE, TestDaemon, connected, new_keys, put


async def next_change(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    async for event in events:
        if event["kind"] != "ALIVE":
            return event
    raise AssertionError("the stream has ended")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stream_tells_of_changes_and_a_snapshot_of_what_is_there(
    migrated_url: str, tmp_path: Path, transport: str
) -> None:
    with running(KvcmProcess(migrated_url, tmp_path, heartbeat_s=60)) as server:
        client, native = TRANSPORTS[transport](server.ports), await connected(server.endpoint)
        daemon = TestDaemon(native, "dmp-0", 64)
        await daemon.register()
        async with aclosing(client.events()) as events:
            first = await anext(events)
            assert first["kind"] == "ALIVE"
            keys = new_keys(3)
            await put(native, daemon, keys)
            added = await next_change(events)
            assert int(added["sequence"]) == int(first["sequence"]) + 1
            told = {"kind": "BLOCKS_ADDED", "node": "dmp-0", "medium": "mem", "epoch": first["epoch"]}
            packed = {"namespace": NAMESPACE, "keys": keys}
            assert added.items() >= {**told, **{n: base64.b64encode(v).decode() for n, v in packed.items()}}.items()
            whole = await client.ok("GetEventSnapshot", "events")
            assert whole["sequence"] == added["sequence"]
            assert whole["nodes"] == [{"node": "dmp-0", "medium": "mem", "is_up": True}]
            assert base64.b64decode(whole["blocks"][0]["keys"]) == keys
            assert whole["next"] == "0"
            await native.call(Flush(NAMESPACE), Flushed)
            removed = await next_change(events)
            assert (removed["kind"], int(removed["sequence"])) == ("BLOCKS_REMOVED", int(added["sequence"]) + 1)
            # A stream that is still open does not keep the server from ending.
            assert server.stop() == 0
        await native.close()


async def test_streams_are_for_those_with_the_token(migrated_url: str, tmp_path: Path) -> None:
    with running(KvcmProcess(migrated_url, tmp_path, kvcm_token="a-token-of-the-tests")) as server:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(GrpcClient(server.ports).events())
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        url = f"http://127.0.0.1:{server.ports.of('events', 'http')}/events"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            assert response.status == 401
        async with aclosing(HttpClient(server.ports, "a-token-of-the-tests").events()) as events:
            assert (await anext(events))["kind"] == "ALIVE"
