"""The process behind the KVCM API: restarts, PostgreSQL away, who is let in, and the pool's own blocks."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import aiohttp
import grpc
import psycopg
import pytest

from meta_server.kvcm.protocol import meta_service_pb2 as meta
from stratakv.wire import Done, PutEnd, PutGrant, PutStart, Registered, RegisterWorker, WorkerInfo, WorkerRole
from tests.integration.meta_server.kvcm.test_meta_service import hits, paths, start, write
from tests.integration.meta_server.test_outage import database_away
from tests.kvcm_clients import TRANSPORTS, Client, GrpcClient, HttpClient, KvcmProcess, running
from tests.meta_process import NAMESPACE, PAGE_BYTES, TestDaemon, connected, new_keys, put
from tests.support import eventually_async

SPECS = [{"name": "tp0", "size": 64}]
STORAGE = {"global_unique_name": "s", "nfs": {"root_path": "/nowhere"}}
INSTANCE = {"instance_id": "m", "instance_group": "default", "block_size": 4, "location_spec_infos": SPECS}


async def test_everything_acknowledged_outlives_a_kill(migrated_url: str, tmp_path: Path) -> None:
    with running(KvcmProcess(migrated_url, tmp_path)) as server:
        client = GrpcClient(server.ports)
        await client.ok("RegisterInstance", **INSTANCE)
        files = paths((await write(client, "m", [1, 2, 3]))["locations"])
        await client.ok("RemoveCache", instance_id="m", block_keys=[2])
        opened = await start(client, "m", [7, 8])
        short = await start(client, "m", [9], write_timeout_seconds=2)
        await client.ok("CreateInstanceGroup", "admin", instance_group={"name": "g"})
        await client.ok("DisableStorage", "admin", storage_unique_name="nfs_01")
        before = await client.ok("GetCacheLocation", instance_id="m", query_type="QT_BATCH_GET", block_keys=[1, 2, 3])
        server.kill()
        server.start()
        asked = {"instance_id": "m", "query_type": "QT_BATCH_GET", "block_keys": [1, 2, 3]}
        assert await client.ok("GetCacheLocation", **asked) == before
        await eventually_async(lambda: [file.exists() for file in files] == [True, False, True])
        assert (await client.ok("GetInstanceGroup", "admin", name="g"))["instance_group"]["version"] == "1"
        assert await client.code("StartWriteCache", instance_id="m", block_keys=[20]) == "IO_ERROR"
        await client.ok("EnableStorage", "admin", storage_unique_name="nfs_01")
        finish = {"instance_id": "m", "success_blocks": {"offset": 2}, "write_session_id": opened["write_session_id"]}
        await client.ok("FinishWriteCache", **finish)
        assert await hits(client, "m", [7, 8, 9]) == [1, 1, 0]

        async def is_given_back() -> bool:
            return (await start(client, "m", [9]))["block_mask"] == {"offset": 0}

        await eventually_async(is_given_back)
        late = finish | {"write_session_id": short["write_session_id"], "success_blocks": {"offset": 1}}
        assert await client.code("FinishWriteCache", **late) == "INVALID_ARGUMENT"
        server.kill()
        server.start()
        await client.ok("FinishWriteCache", **finish)
        assert await hits(client, "m", [7, 8, 9]) == [1, 1, 0]
        assert server.stop() == 0


async def test_only_those_with_the_token_are_let_in(migrated_url: str, tmp_path: Path) -> None:
    token = "a-token-of-the-tests"
    with running(KvcmProcess(migrated_url, tmp_path, kvcm_token=token)) as server:
        for transport in TRANSPORTS.values():
            assert await transport(server.ports, token).code("GetInstanceInfo") == "INSTANCE_NOT_EXIST"
        for wrong in (None, "another"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await GrpcClient(server.ports, wrong).call("GetInstanceInfo")
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
            headers = HttpClient(server.ports, wrong).headers
            async with aiohttp.ClientSession(headers=headers) as session:
                base = f"http://127.0.0.1:{server.ports.of('meta', 'http')}"
                for method, path in (("POST", "/api/getInstanceInfo"), ("GET", "/metrics")):
                    async with session.request(method, base + path) as response:
                        assert response.status == 401
        assert token not in server.log()


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_a_port_in_use_is_named(migrated_url: str, tmp_path: Path, transport: str) -> None:
    server = KvcmProcess(migrated_url, tmp_path)
    port = server.ports.of("admin", transport)
    with socket.create_server(("127.0.0.1", port)):
        status, said = server.run()
    assert status == 2
    assert f"meta.admin_{transport}_port" in said
    assert str(port) in said


async def test_a_malformed_grpc_message_gets_an_answer(migrated_url: str, tmp_path: Path) -> None:
    with running(KvcmProcess(migrated_url, tmp_path)) as server:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports.of('meta', 'grpc')}") as channel:
            path = "/kv_cache_manager.proto.meta.MetaService/GetCacheLocation"
            call = channel.unary_unary(path, lambda body: body, meta.GetCacheLocationResponse.FromString)
            answer = await call(b"\xff\xff\xff", timeout=10)
    assert answer.header.status.code == meta.INVALID_ARGUMENT


async def test_while_the_database_is_away_reads_go_on_and_writes_are_told_to_come_back(
    migrated_url: str, tmp_path: Path
) -> None:
    with running(KvcmProcess(migrated_url, tmp_path)) as server:
        client = GrpcClient(server.ports)
        await client.ok("RegisterInstance", **INSTANCE)
        await write(client, "m", [1])
        opened = await start(client, "m", [2])
        finish = {"instance_id": "m", "success_blocks": {"offset": 1}, "write_session_id": opened["write_session_id"]}
        with database_away(migrated_url):
            assert await client.code("FinishWriteCache", **finish) == "SERVICE_NOT_READY"
            assert await client.code("StartWriteCache", instance_id="m", block_keys=[3]) == "SERVICE_NOT_READY"
            assert await client.code("AddStorage", "admin", storage=STORAGE) == "SERVICE_NOT_READY"
            assert (await client.ok("CheckHealth", "admin"))["is_health"] is False
            assert await hits(client, "m", [1, 2]) == [1, 0]

        async def is_finished() -> bool:
            return await client.code("FinishWriteCache", **finish) == "OK"

        await eventually_async(is_finished)
        assert await hits(client, "m", [1, 2]) == [1, 1]
        assert (await client.ok("CheckHealth", "admin"))["is_health"] is True


async def test_a_write_whose_client_went_away_before_its_answer_holds_nobody_up(
    migrated_url: str, tmp_path: Path
) -> None:
    with running(KvcmProcess(migrated_url, tmp_path)) as server:
        client = GrpcClient(server.ports)
        await client.ok("RegisterInstance", **INSTANCE)
        with psycopg.connect(migrated_url) as connection:
            connection.execute("LOCK TABLE stratakv.kvcm_writes IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await start(client, "m", [1], write_timeout_seconds=3600)
            # By the same connection: when it is answered, the server knows of the client's going away.
            await client.ok("GetClusterInfo")

        async def is_given_back() -> bool:
            return (await start(client, "m", [1]))["locations"] != []

        await eventually_async(is_given_back)


async def test_the_pools_own_blocks_are_visible(migrated_url: str, tmp_path: Path) -> None:
    # Nobody sends heartbeats here.
    with running(KvcmProcess(migrated_url, tmp_path, heartbeat_s=60)) as server:
        native = await connected(server.endpoint)
        daemon = TestDaemon(native, "dmp-0", 64)
        await daemon.register()
        for port, node in ((1, "dmp-0"), (2, "dmp-1"), (3, None)):
            url = f"http://127.0.0.1:{port}"
            epoch = os.urandom(16)
            info = WorkerInfo(f"w{port}", epoch, url, WorkerRole.BOTH, "model", NAMESPACE, 16, 1024, node)
            await native.call(RegisterWorker(info), Registered)
        keys = new_keys(3)
        await put(native, daemon, keys[:64])
        other = TestDaemon(native, "dmp-1", 64)
        await other.register()
        put_id = os.urandom(16)
        start_on_other = PutStart(put_id, NAMESPACE, keys[64:], PAGE_BYTES, 16, prefer_node="dmp-1")
        assert (await native.call(start_on_other, PutGrant)).segment == other.segment
        await native.call(PutEnd(put_id, other.segment.epoch, other.allocate(1)), Done)
        low = [int.from_bytes(keys[i * 32 + 24 : i * 32 + 32], "big", signed=True) for i in range(3)]
        instance = f"stratakv-{NAMESPACE.hex()}"
        clients: list[Client] = [transport(server.ports) for transport in TRANSPORTS.values()]
        for client in clients:
            found = await client.ok("GetCacheLocation", instance_id=instance, block_keys=[*low, 1])
            uris = [location["location_specs"][0]["uri"] for location in found["locations"]]
            assert len(uris) == 3
            nodes = ["dmp-0", "dmp-0", "dmp-1"]
            assert [uri.partition("&")[0] for uri in uris] == [f"dmp://127.0.0.1:1?node={node}" for node in nodes]
            assert await hits(client, instance, [1, low[1]], block_mask={"offset": 1}) == [1]
            told = (await client.ok("GetInstanceInfo", instance_id=instance))["instance_info"]
            assert (told["block_size"], told["model_deployment"]["model_name"]) == (16, "model")
            metas = await client.ok("GetCacheMeta", instance_id=instance, block_keys=[low[0], 1])
            assert metas["metas"] == ['{"status":"SERVING"}', '{"status":"NOT_FOUND"}']
            assert await client.code("StartWriteCache", instance_id=instance, block_keys=[1]) == "UNSUPPORTED"
            assert await client.code("RemoveCache", instance_id=instance, block_keys=low) == "UNSUPPORTED"
            assert await client.code("TrimCache", instance_id=instance) == "UNSUPPORTED"
            hosts = await client.ok("GetHostCacheState", instance_id=instance, block_cache_keys=[*low, 1])
            match = {"host_ip_port": "127.0.0.1:1", "local": "2", "p2p_1_fetch": "1", "p2p_1_total_match": "3"}
            assert hosts["hosts"] == [match]
            asked = {"instance_id": instance, "block_cache_keys": low}
            assert (await client.ok("GetHostCacheState", medium=["disk"], **asked))["hosts"] == []
            assert await client.code("GetHostCacheState", query_type="QT_BATCH_GET", **asked) == "UNSUPPORTED"
            assert await client.code("GetHostCacheState", instance_id=instance) == "INVALID_ARGUMENT"
            assert await client.code("GetHostCacheState", instance_id="nobody") == "INSTANCE_NOT_EXIST"
        more = new_keys(1)
        await put(native, daemon, more)
        assert await hits(clients[0], instance, [int.from_bytes(more[24:32], "big", signed=True)]) == [1]
        await native.close()
