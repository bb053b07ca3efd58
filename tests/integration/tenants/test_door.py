"""Who is let in at the REST face, as whom, and where to."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import psycopg
import pytest

from dbnode.tenants.directory import Directory
from stratakv.errors import PermissionDenied
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import DatabaseSettings, RestSettings, Secret
from stratakv.tenancy.administration import Administration
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import MODEL, StandInWorker
from tests.support import eventually_async

OPERATOR = "operator's key"


@pytest.fixture
async def worker() -> AsyncIterator[StandInWorker]:
    started = await StandInWorker("w").start()
    yield started
    await started.stop()


@pytest.fixture
async def node(metadata: str, worker: StandInWorker) -> AsyncIterator[RunningNode]:
    async with running_node(worker, database_url=metadata, rest=RestSettings(api_key=Secret(OPERATOR))) as running:
        yield running


async def status(node: RunningNode, path: str, key: str | None, **json: object) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    method = "POST" if json else "GET"
    async with node.http.request(method, path, json=json or None, headers=headers) as response:
        await response.read()
        return response.status


ASK = {"prompt": "a", "max_tokens": 1}


async def test_a_key_opens_what_its_tenant_and_it_may_do(node: RunningNode, admin: Administration) -> None:
    admin.create_tenant("acme", {"permissions": ["infer", "pin"]})
    plain = admin.create_key("acme", "plain").key
    narrow = admin.create_key("acme", "narrow", permissions=["pin", "admin"]).key
    await eventually_async(lambda: node.node.tenants.has_keys)
    await eventually_async(lambda: len(node.node.tenants.tenants()) == 2)
    assert await status(node, "/v1/completions", plain, **ASK) == 200
    assert await status(node, "/v1/models", plain) == 200
    for path in ("/admin/routes", "/admin/workers", "/metrics"):
        assert await status(node, path, plain) == 403
        assert await status(node, path, OPERATOR) == 200
    await eventually_async(lambda: status_is(node, "/v1/completions", narrow, 403))
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key=narrow, max_retries=0) as client:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    assert caught.value.code == "permission_denied"
    assert (
        await status(node, "/v1/stratakv/pin", narrow, prompt="a", seconds=1) == 503
    )  # let in; there is no meta server
    assert await status(node, "/admin/routes", narrow) == 403  # its tenant may not
    assert await status(node, "/health", None) == 200


async def status_is(node: RunningNode, path: str, key: str, expected: int) -> bool:
    return await status(node, path, key, **ASK) == expected


async def test_a_change_is_seen_within_seconds(node: RunningNode, admin: Administration) -> None:
    admin.create_tenant("acme", {})
    made = admin.create_key("acme", "key")
    await eventually_async(lambda: status_is(node, "/v1/completions", made.key, 200))
    admin.update_tenant("acme", {"is_enabled": False})
    await eventually_async(lambda: status_is(node, "/v1/completions", made.key, 403))
    admin.update_tenant("acme", {"is_enabled": True})
    await eventually_async(lambda: status_is(node, "/v1/completions", made.key, 200))
    admin.update_tenant("acme", {"models": ["another"]})
    await eventually_async(lambda: status_is(node, "/v1/completions", made.key, 403))
    assert await status(node, f"/v1/models/{MODEL}", made.key) == 404
    admin.update_tenant("acme", {"models": [MODEL]})
    await eventually_async(lambda: status_is(node, "/v1/completions", made.key, 200))
    admin.update_tenant("acme", {"networks": ["10.0.0.0/8"]})
    await eventually_async(lambda: status_is(node, "/v1/completions", made.key, 403))
    admin.update_tenant("acme", {"networks": ["10.0.0.0/8", "127.0.0.0/8"]})
    await eventually_async(lambda: status_is(node, "/v1/completions", made.key, 200))
    admin.revoke_key(made.prefix)
    await eventually_async(lambda: status_is(node, "/v1/completions", made.key, 401))


@pytest.mark.parametrize(
    "key", [None, "", "wrong", "skv-", "skv-00000000-x", OPERATOR + "s", OPERATOR[:-1], "skv-" + "x" * 4000]
)
async def test_what_is_no_key_opens_nothing(node: RunningNode, key: str | None) -> None:
    assert await status(node, "/v1/completions", key, **ASK) == 401


async def test_without_an_operators_key_all_are_the_operator_until_a_tenant_has_a_key(
    metadata: str, admin: Administration, worker: StandInWorker
) -> None:
    async with running_node(worker, database_url=metadata) as node:
        for key in (None, "whatever"):
            assert await status(node, "/admin/routes", key) == 200
        assert await status(node, "/v1/completions", "skv-00000000-guessed", **ASK) == 401
        admin.create_tenant("acme", {})
        made = admin.create_key("acme", "key")
        await eventually_async(lambda: status_is(node, "/v1/completions", made.key, 200))
        for key in (None, "whatever"):
            assert await status(node, "/admin/routes", key) == 401


async def test_usage_names_the_tenant(node: RunningNode, admin: Administration, metadata: str) -> None:
    admin.create_tenant("acme", {})
    made = admin.create_key("acme", "key")
    await eventually_async(lambda: status_is(node, "/v1/completions", made.key, 200))
    with psycopg.connect(metadata, autocommit=True) as connection:
        tenants = "SELECT t.name FROM stratakv.usage_events e JOIN stratakv.tenants t ON t.id = e.tenant_id"
        await eventually_async(lambda: connection.execute(tenants).fetchall() == [("acme",)])


async def test_the_last_state_holds_while_the_database_is_away(
    metadata: str, postgres: EmbeddedPostgres, admin: Administration, worker: StandInWorker
) -> None:
    admin.create_tenant("acme", {})
    made = admin.create_key("acme", "key", lifetime_s=3600)
    async with running_node(worker, database_url=metadata) as node:
        admin._connection.close()
        with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
            name = psycopg.conninfo.conninfo_to_dict(metadata)["dbname"]
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
            assert await status(node, "/v1/completions", made.key, **ASK) == 200
            assert await status(node, "/v1/completions", None, **ASK) == 401
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


async def test_a_role_is_a_tenants_by_cluster_name_and_oid(metadata: str, admin: Administration) -> None:
    with psycopg.connect(metadata, autocommit=True) as connection:
        connection.execute("CREATE ROLE of_acme LOGIN")
        admin.create_tenant("acme", {"permissions": ["infer"]})
        mapped = admin.map_role("acme", "of_acme", metadata)
        connection.execute("DROP ROLE of_acme")
    directory = Directory(DatabaseSettings(url=Secret(metadata)))
    await directory.load()
    cluster, oid = mapped["cluster"], mapped["oid"]
    assert directory.of_role("of_acme", oid, cluster).name == "acme"
    assert directory.of_role("of_acme", oid + 1, cluster).name == "default"
    assert directory.of_role("of_acme", oid, cluster + "1").name == "default"
    assert directory.of_role("nobody", None, "").name == "default"
    for known in ((None, cluster), (oid, "")):
        with pytest.raises(PermissionDenied):
            directory.of_role("of_acme", *known)
