"""A tenant tries to learn what another one has asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from dbnode.scheduler.planner import PromptKeys
from dbnode.sql.service import InferCall, Login
from dbnode.sql_explain import SqlExplainer
from dbnode.sql_inference import SqlInference
from dbnode.suspects import STRIKES_MAX, prompt_id
from dbnode.tenants.salts import combined_salt
from stratakv.settings import RestSettings, Secret
from stratakv.tenancy.administration import Administration
from stratakv.wire import ListOwners, ListWorkers, Match, OwnerStates, SetOwnerLimits, Workers
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import StandInWorker
from tests.support import eventually_async

SECRET = "The merger with the firm that nobody may know of is to be announced on the third of May. " * 10
UNASKED = SECRET.replace("The merger", "Any merger", 1)
"""As long as that in tokens."""
OPERATOR = "operator's key"


class ListeningPool:
    """A meta server's answers; remembers which keys it was asked for."""

    available = True

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    async def call(self, request: Any, reply_type: type[Any], timeout_s: float | None = None) -> Any:
        if isinstance(request, ListWorkers):
            return Workers([])
        if isinstance(request, SetOwnerLimits | ListOwners):
            return OwnerStates([])
        self.asked.append(request.keys)
        return Match(0)


@pytest.fixture
def pool() -> ListeningPool:
    return ListeningPool()


@pytest.fixture
async def worker() -> AsyncIterator[StandInWorker]:
    started = await StandInWorker("w").start()
    yield started
    await started.stop()


@pytest.fixture
async def node(
    metadata: str, admin: Administration, pool: ListeningPool, worker: StandInWorker
) -> AsyncIterator[RunningNode]:
    for name in ("victim", "attacker", "sharing", "sharing too"):
        admin.create_tenant(name, {"permissions": ["infer", "pin"], "shares_cache": name.startswith("sharing")})
    rest = RestSettings(api_key=Secret(OPERATOR))
    async with running_node(worker, database_url=metadata, rest=rest, meta=pool) as running:
        yield running


@pytest.fixture
def keys(node: RunningNode, admin: Administration) -> dict[str, str]:
    return {name: admin.create_key(name, "key").key for name in ("victim", "attacker", "sharing", "sharing too")}


async def cached(node: RunningNode, key: str, **fields: object) -> int:
    """Tokens that the API says were cached."""
    body = {"prompt": SECRET, "max_tokens": 1, **fields}
    async with node.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


async def known(node: RunningNode, *keys: str) -> None:
    async def all_known() -> bool:
        for key in keys:
            async with node.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}) as response:
                if response.status != 200:
                    return False
        return True

    await eventually_async(all_known)


async def test_the_same_prompt_of_another_tenant_is_not_found(node: RunningNode, keys: dict[str, str]) -> None:
    await known(node, *keys.values())
    assert await cached(node, keys["victim"]) == 0
    assert await cached(node, keys["victim"]) > 100
    for other in (keys["attacker"], OPERATOR):
        assert await cached(node, other) == 0
    for other in (keys["sharing"], keys["sharing too"]):
        assert await cached(node, other) > 100  # as the operator, by agreement


async def test_workers_are_told_whose_blocks_they_fill(
    node: RunningNode, keys: dict[str, str], worker: StandInWorker, admin: Administration
) -> None:
    await known(node, *keys.values())
    for name in ("victim", "sharing"):
        await cached(node, keys[name])
    await cached(node, OPERATOR)
    assert worker.owners == [str(admin.tenant(name)["id"]) for name in ("victim", "sharing", "default")]


async def test_who_knows_the_victims_salts_does_not_come_in_by_them(
    node: RunningNode, keys: dict[str, str], metadata: str
) -> None:
    await known(node, *keys.values())
    assert await cached(node, keys["victim"], cache_salt="s") == 0
    assert await cached(node, keys["victim"], cache_salt="s") > 100
    with psycopg.connect(metadata) as connection:
        row = connection.execute("SELECT salt FROM stratakv.tenants WHERE name = 'victim'").fetchone()
    assert row is not None
    salt = str(row[0])
    made = combined_salt(salt, "s")
    for attacker in (keys["attacker"], keys["sharing"]):
        for guess in ("s", salt, made, f"{salt}s", combined_salt(salt, None)):
            assert await cached(node, attacker, cache_salt=guess) == 0


async def test_the_pool_is_asked_for_other_keys_also_by_a_pin(
    node: RunningNode, keys: dict[str, str], pool: ListeningPool
) -> None:
    await known(node, *keys.values())

    async def asked(key: str) -> list[bytes]:
        pool.asked.clear()
        await cached(node, key)
        body = {"prompt": SECRET, "seconds": 1}
        headers = {"authorization": f"Bearer {key}"}
        async with node.http.post("/v1/stratakv/pin", json=body, headers=headers) as response:
            await response.read()
        return list(pool.asked)

    first, second = await asked(keys["victim"]), await asked(keys["attacker"])
    assert first
    assert second
    assert not {*first} & {*second}


async def test_explain_and_the_dedupe_of_sql_tell_nothing_of_another_tenants_prompts(
    node: RunningNode, admin: Administration, metadata: str
) -> None:
    with psycopg.connect(metadata, autocommit=True) as connection:
        mapped = {}
        for name in ("victim", "attacker"):
            connection.execute(f"CREATE ROLE {name}_role LOGIN")
            mapped[name] = admin.map_role(name, f"{name}_role", metadata)
            connection.execute(f"DROP ROLE {name}_role")
    await eventually_async(lambda: len(node.node.tenants._snapshot.roles) == 2)

    def call(name: str) -> InferCall:
        login = Login(f"{name}_role", mapped[name]["oid"], mapped[name]["cluster"])
        return InferCall(SECRET, None, {"max_tokens": 1}, "the same role", "d", "s", login=login)

    sql = SqlInference(node.node.inference, node.node.tenants)
    explainer = SqlExplainer(node.node.inference, node.node.tenants)
    await sql.infer_text(call("victim"))
    assert (await explainer.estimate([call("victim")])).cached_tokens > 100
    assert (await explainer.estimate([call("attacker")])).cached_tokens == 0


async def test_what_tells_of_all_tenants_is_for_administrators(node: RunningNode, keys: dict[str, str]) -> None:
    await known(node, *keys.values())
    for path in ("/admin/routes", "/admin/workers", "/metrics"):
        async with node.http.get(path, headers={"authorization": f"Bearer {keys['attacker']}"}) as response:
            assert response.status == 403


async def test_what_is_remembered_of_texts_is_each_tenants_own(node: RunningNode, keys: dict[str, str]) -> None:
    await known(node, *keys.values())
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 1}
    async with node.http.post(
        "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {keys['victim']}"}
    ) as response:
        assert response.status == 200
    owners = {owner for owner, piece in node.node.inference.tokens._encoder._tokens if SECRET in piece}
    assert len(owners) == 1
    assert owners != {""}


async def told_of(node: RunningNode, key: str, prompt: str) -> tuple[object, ...]:
    """All that an answer says besides its text, its id and its times."""
    headers = {"authorization": f"Bearer {key}", "x-stratakv-timing": "1"}
    body = {"prompt": prompt, "max_tokens": 1}
    async with node.http.post("/v1/completions", json=body, headers=headers) as response:
        answer = await response.json()
        timeless = [
            {name: value for name, value in told.items() if not name.endswith("_ms")}
            for told in (answer.pop("metrics"), answer["usage"], answer["usage"].pop("stratakv"))
        ]
        return response.status, sorted(response.headers), sorted(answer), timeless


async def test_all_that_is_told_of_anothers_prompt_is_told_of_one_that_nobody_has_asked(
    node: RunningNode, keys: dict[str, str]
) -> None:
    await known(node, *keys.values())
    for _ in range(2):
        await cached(node, keys["victim"])
    assert await told_of(node, keys["attacker"], SECRET) == await told_of(node, keys["attacker"], UNASKED)


async def test_an_early_refusal_reckons_with_the_prompts_of_the_tenant_only(
    metadata: str, admin: Administration
) -> None:
    worker = await StandInWorker("w", load={"prefill_tokens_per_s": 100.0}).start()
    keys = {}
    for name in ("victim", "attacker"):
        admin.create_tenant(name, {})
        keys[name] = admin.create_key(name, "key").key

    async def refusal(node: RunningNode, name: str, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 1, "slo_class": "interactive"}
        headers = {"authorization": f"Bearer {keys[name]}"}
        async with node.http.post("/v1/completions", json=body, headers=headers) as response:
            assert response.status == 429
            return str((await response.json())["error"]["message"]).partition(" and wanted")[0]

    rest = RestSettings(api_key=Secret(OPERATOR))
    async with running_node(worker, database_url=metadata, rest=rest, interactive_ttft_s=3.0) as node:
        await known(node, *keys.values())
        await cached(node, keys["victim"], slo_class="batch")
        worker.load["waiting_tokens"] = 1000
        (record,) = node.node.directory.records
        await eventually_async(lambda: record.load.waiting_tokens, what="the node hears that it is busy")
        of_secret = await refusal(node, "attacker", SECRET)
        assert of_secret == await refusal(node, "attacker", UNASKED)
        assert of_secret != await refusal(node, "victim", SECRET)  # computed already, so it would come sooner
    await worker.stop()


async def test_a_prompt_that_killed_workers_for_one_tenant_is_not_refused_to_another(
    node: RunningNode, keys: dict[str, str]
) -> None:
    await known(node, *keys.values())
    inference = node.node.inference
    token_ids = await inference.tokens.of_text(SECRET, special=True)
    salt = next(tenant.salt for tenant in node.node.tenants.tenants() if tenant.name == "victim")
    its_id = prompt_id(PromptKeys(token_ids, combined_salt(salt, None)))
    for _ in range(STRIKES_MAX):
        assert inference.suspects.is_cause(its_id, None)
    statuses = {}
    for name in ("victim", "attacker"):
        headers = {"authorization": f"Bearer {keys[name]}"}
        body = {"prompt": SECRET, "max_tokens": 1}
        async with node.http.post("/v1/completions", json=body, headers=headers) as response:
            statuses[name] = response.status
    assert statuses == {"victim": 422, "attacker": 200}


async def test_the_id_under_which_a_request_settles_is_not_the_clients_to_choose(
    node: RunningNode, keys: dict[str, str]
) -> None:
    """Else a tenant could settle another one's request before it."""
    await known(node, *keys.values())
    ids = []
    for name in ("victim", "attacker"):
        headers = {"authorization": f"Bearer {keys[name]}", "x-request-id": ids[0] if ids else "chosen"}
        body = {"prompt": "x", "max_tokens": 1, "request_id": ids[0]} if ids else {"prompt": "x", "max_tokens": 1}
        async with node.http.post("/v1/completions", json=body, headers=headers) as response:
            answer = await response.json()
            ids.append(answer.get("id"))
    assert ids[0] != "chosen"
    assert ids[1] != ids[0]  # refused by name, or another one


PATHS = (
    *(
        "/metrics/",
        "//metrics",
        "/./metrics",
        "/v1/../metrics",
        "/%6detrics",
        "/metrics%2f",
        "/metrics%00",
        "/metrics;a",
        "/METRICS",
    ),
    *(
        "/metrics?a=/v1/models",
        "/metrics#",
        "http://h/metrics",
        "/v1/models/../../metrics",
        "/v1/models/%2e%2e/%2e%2e/metrics",
    ),
    *(
        "/admin/routes/",
        "//admin/routes",
        "/admin%2froutes",
        "/%61dmin/routes",
        "/v1/../admin/workers",
        "/Admin/workers",
        "\\admin/routes",
    ),
)
SPOOFED = (
    "X-Original-URL: /metrics\r\nX-Rewrite-URL: /metrics\r\nX-Forwarded-Prefix: /metrics\r\nX-Forwarded-For: 127.0.0.1"
)


async def test_no_spelling_of_a_path_leads_to_what_is_for_administrators(
    node: RunningNode, keys: dict[str, str]
) -> None:
    await known(node, *keys.values())
    for path in PATHS:
        for method in ("GET", "HEAD", "POST"):
            reader, writer = await asyncio.open_connection("127.0.0.1", node.http._base_url.port)  # type: ignore[union-attr]
            head = f"{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 0\r\n{SPOOFED}\r\n"
            writer.write(f"{head}Authorization: Bearer {keys['attacker']}\r\n\r\n".encode())
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            assert not answer.startswith(b"HTTP/1.1 200"), (method, path)
            assert b"stratakv_" not in answer, (method, path)
