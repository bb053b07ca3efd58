"""The KVCM API of two meta servers on one database: what who stands by says, and what passes to the next leader."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from tests.integration.meta_server.kvcm.test_meta_service import hits, start
from tests.integration.meta_server.kvcm.test_process import INSTANCE
from tests.kvcm_clients import SERVICES, TRANSPORTS, Client, GrpcClient, HttpClient, KvcmProcess
from tests.support import eventually, eventually_async

EVERYWHERE = {
    *("GetClusterInfo", "CheckHealth", "GetManagerClusterInfo"),
    *("LeaderDemote", "GetLeaderElectorConfig", "UpdateLeaderElectorConfig", "UpdateLogger"),
}


@asynccontextmanager
async def two(url: str, directory: Path) -> AsyncIterator[tuple[KvcmProcess, KvcmProcess]]:
    """The first one leads."""
    servers = []
    try:
        for name in ("a", "b"):
            (directory / name).mkdir()
            servers.append(KvcmProcess(url, directory / name, leader_lease_s=1.0))
            servers[-1].launch()
            said = " ready " if name == "a" else " standing_by "
            eventually(lambda said=said: said in servers[-1].log(), what=f"it says{said}")
        yield servers[0], servers[1]
    finally:
        for server in servers:
            server.kill()


def status(answer: dict[str, Any]) -> dict[str, str]:
    return answer["header"]["status"]


async def leads(client: Client) -> bool:
    return bool((await client.ok("CheckHealth", "admin"))["is_leader"])


async def test_who_stands_by_names_the_leader_in_every_call_over_both_transports(
    migrated_url: str, tmp_path: Path
) -> None:
    async with two(migrated_url, tmp_path) as (leader, standby):
        for transport in TRANSPORTS.values():
            client = transport(standby.ports)
            for service in ("meta", "admin"):
                for call in {method.name for method in SERVICES[service].methods} - EVERYWHERE:
                    said = status(await client.call(call, service))
                    assert said["code"] == "SERVER_NOT_LEADER", call
                    assert f"127.0.0.1:{leader.ports.of('meta', 'http')}" in said["message"]
            cluster = await client.ok("GetClusterInfo")
            assert cluster["self_node_id"] == f"127.0.0.1:{standby.port}"
            assert cluster["leader_node_id"] == cluster["leader_endpoint"]["node_id"] == f"127.0.0.1:{leader.port}"
            assert cluster["leader_endpoint"]["meta_rpc_port"] == leader.ports.of("meta", "grpc")
            health = await client.ok("CheckHealth", "admin")
            assert (health["is_leader"], health["is_health"]) == (False, True)
            manager = await client.ok("GetManagerClusterInfo", "admin")
            assert (manager["leader_node_id"], manager["self_leader_expiration_time"]) == (
                cluster["leader_node_id"],
                "0",
            )
            said = status(await client.call("LeaderDemote", "admin"))
            assert said["code"] == "SERVER_NOT_LEADER"
            assert await leads(transport(leader.ports))


async def test_write_sessions_pass_to_the_next_leader(migrated_url: str, tmp_path: Path) -> None:
    async with two(migrated_url, tmp_path) as (first, second):
        old, new = HttpClient(first.ports), GrpcClient(second.ports)
        await old.ok("RegisterInstance", **INSTANCE)
        opened, short = await start(old, "m", [1, 2]), await start(old, "m", [3], write_timeout_seconds=1)
        first.kill()
        await eventually_async(lambda: leads(new), what="the other one leads")
        finish = {"instance_id": "m", "success_blocks": {"offset": 2}, "write_session_id": opened["write_session_id"]}
        wrong = finish | {"success_blocks": {"offset": 3}}
        assert await new.code("FinishWriteCache", **wrong) == "INVALID_ARGUMENT", "checked before anything changes"
        for _ in range(2):
            await new.ok("FinishWriteCache", **finish)
        assert await hits(new, "m", [1, 2, 3]) == [1, 1, 0]
        late = finish | {"write_session_id": short["write_session_id"], "success_blocks": {"offset": 1}}

        async def is_over() -> bool:
            return (await start(new, "m", [3]))["block_mask"] == {"offset": 0}

        await eventually_async(is_over, what="a session that ran out is given back")
        assert await new.code("FinishWriteCache", **late) == "INVALID_ARGUMENT"


async def test_a_leader_steps_down_on_request_and_stays_away_for_its_delay(migrated_url: str, tmp_path: Path) -> None:
    async with two(migrated_url, tmp_path) as (first, second):
        old, new = GrpcClient(first.ports), HttpClient(second.ports)
        config = await old.ok("GetLeaderElectorConfig", "admin")
        assert config["campaign_delay_time_ms"] == "1000", "a lease"
        await old.ok("UpdateLeaderElectorConfig", "admin", campaign_delay_time_ms=60_000)
        assert (await old.ok("GetLeaderElectorConfig", "admin"))["campaign_delay_time_ms"] == "60000"
        negative = {"campaign_delay_time_ms": -1}
        assert await old.code("UpdateLeaderElectorConfig", "admin", **negative) == "INVALID_ARGUMENT"
        await old.ok("LeaderDemote", "admin")
        await eventually_async(lambda: leads(new), what="the other one leads")
        assert not await leads(old)


async def test_who_stands_by_knows_the_accounts_too_and_so_does_the_next_leader(
    migrated_url: str, tmp_path: Path
) -> None:
    login = ("operator", "a long password")
    account = {"user_name": login[0], "password": login[1], "role": "ROLE_ADMIN"}
    async with two(migrated_url, tmp_path) as (leader, standby):
        await GrpcClient(leader.ports).ok("AddAccount", "admin", **account)
        known, stranger = GrpcClient(standby.ports, login=login), GrpcClient(standby.ports)

        async def is_refused() -> bool:
            try:
                await stranger.call("CheckHealth", "admin")
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.UNAUTHENTICATED
            return False

        await eventually_async(is_refused)
        assert not await leads(known)
        leader.kill()
        await eventually_async(lambda: leads(known))
        assert await is_refused()
        assert [one["user_name"] for one in (await known.ok("ListAccount", "admin"))["accounts"]] == [login[0]]
