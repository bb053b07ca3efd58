"""DebugService: calls fail as they were told to, over both transports; and there is no such service unless it is enabled."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import grpc
import psycopg
import pytest

from stratakv import migrate
from stratakv.postgres import EmbeddedPostgres
from tests.kvcm_clients import TRANSPORTS, Client, GrpcClient, KvcmProcess, running

CALL = "GetInstanceInfo"


@pytest.fixture(scope="module")
def server(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KvcmProcess]:
    name = f"kvcm_{uuid.uuid4().hex}"
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        url = postgres.database_url(name)
        migrate.upgrade(url)
        with running(KvcmProcess(url, tmp_path_factory.mktemp("kvcm"), debug_service="true")) as process:
            yield process
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(autouse=True)
async def no_faults(client: Client) -> None:
    await client.ok("ClearFaults", "debug")


async def codes(client: Client, count: int) -> list[bool]:
    """Of so many calls, which of them failed by injection."""
    return [await client.code(CALL, instance_id="nobody") == "INTERNAL_ERROR" for _ in range(count)]


async def test_a_fault_strikes_at_every_call_until_it_is_removed(client: Client) -> None:
    await client.ok("InjectFault", "debug", api_name=CALL, fault_trigger_strategy="ALWAYS")
    assert await codes(client, 3) == [True] * 3
    assert await client.code("GetClusterInfo") == "OK"
    await client.ok("RemoveFault", "debug", api_name=CALL)
    assert await codes(client, 2) == [False] * 2


async def test_a_fault_strikes_once_or_from_a_call_on(client: Client) -> None:
    await client.ok("InjectFault", "debug", api_name=CALL, fault_trigger_strategy="ONCE", trigger_at_call=2)
    assert await codes(client, 4) == [False, True, False, False]
    await client.ok("InjectFault", "debug", api_name=CALL, trigger_at_call=3)
    assert await codes(client, 4) == [False, False, True, True]
    await client.ok("ClearFaults", "debug")
    assert await codes(client, 1) == [False]


async def test_faults_can_be_had_of_admin_calls_too(client: Client) -> None:
    await client.ok("InjectFault", "debug", api_name="ListStorage")
    assert await client.code("ListStorage", "admin") == "INTERNAL_ERROR"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("InjectFault", {"api_name": "NoSuchCall"}),
        ("InjectFault", {"api_name": "InjectFault"}),
        ("InjectFault", {"api_name": CALL, "trigger_at_call": -1}),
        ("InjectFault", {"api_name": CALL, "fault_type": 7}),
        ("InjectFault", {"api_name": CALL, "fault_trigger_strategy": 7}),
        ("RemoveFault", {"api_name": "NoSuchCall"}),
        ("RemoveFault", {"api_name": CALL}),
    ],
)
async def test_what_makes_no_sense_is_refused(client: Client, name: str, fields: dict[str, object]) -> None:
    assert await client.code(name, "debug", **fields) == "INVALID_ARGUMENT"


async def test_it_is_off_by_default(migrated_url: str, tmp_path: Path) -> None:
    with running(KvcmProcess(migrated_url, tmp_path)) as server:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await GrpcClient(server.ports).call("ClearFaults", "debug")
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        url = f"http://127.0.0.1:{server.ports.of('debug', 'http')}/api/clearFaults"
        async with aiohttp.ClientSession() as session, session.post(url) as response:
            assert response.status == 404
        assert await TRANSPORTS["http"](server.ports).code("GetClusterInfo") == "OK"
