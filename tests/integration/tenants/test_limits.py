"""Limits of tenants from the outside: what clients are told, and what they are charged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import psycopg
import pytest

from dbnode.charge import Charge
from dbnode.errors import QuotaExceeded
from dbnode.sql.service import InferCall, Login
from dbnode.sql.topics import Asked
from dbnode.sql_conversations import SqlConversations
from dbnode.sql_inference import SqlInference
from stratakv.settings import RestSettings, Secret
from stratakv.tenancy.administration import Administration
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import MODEL, StandInWorker
from tests.support import eventually_async

PROMPT = list(range(100, 148))
"""Three blocks."""


@pytest.fixture
async def worker() -> AsyncIterator[StandInWorker]:
    started = await StandInWorker("w").start()
    yield started
    await started.stop()


@pytest.fixture
async def node(metadata: str, worker: StandInWorker) -> AsyncIterator[RunningNode]:
    rest = RestSettings(api_key=Secret("operator"))
    async with running_node(worker, database_url=metadata, rest=rest) as running:
        yield running


async def client(node: RunningNode, admin: Administration, **limits: int) -> openai.AsyncOpenAI:
    """Of a tenant with these limits."""
    admin.create_tenant("acme", {})
    admin.set_limits("acme", limits)
    key = admin.create_key("acme", "key").key
    await eventually_async(lambda: node.node.tenants.has_keys)
    return openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key=key, max_retries=0, timeout=30)


def quota(admin: Administration) -> dict[str, Any]:
    return admin.quotas("acme")[0]


async def test_a_client_is_told_what_is_left_and_when_to_come_again(node: RunningNode, admin: Administration) -> None:
    acme = await client(node, admin, requests_per_minute=2, tokens_per_minute=1000)
    for left in (1, 0):
        raw = await acme.completions.with_raw_response.create(model=MODEL, prompt=PROMPT, max_tokens=10)
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-remaining-requests"] == str(left)
        assert raw.headers["x-ratelimit-limit-tokens"] == "1000"
        assert raw.headers["x-ratelimit-reset-tokens"].endswith("s")
    with pytest.raises(openai.RateLimitError) as caught:
        await acme.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10)
    assert caught.value.code == "quota_exceeded"
    assert 25 <= int(caught.value.response.headers["retry-after"]) <= 30
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    too_much = await node.http.post(
        "/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 2000},
        headers={"authorization": f"Bearer {acme.api_key}"},
    )
    assert too_much.status == 429
    unlimited = await node.http.get("/v1/models", headers={"authorization": "Bearer operator"})
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]
    await acme.close()


async def test_what_was_taken_is_charged_and_cached_tokens_by_their_ratio(
    node: RunningNode, admin: Administration
) -> None:
    acme = await client(node, admin, tokens_per_month=1000, cached_token_micros=250_000)
    await acme.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10)
    await eventually_async(lambda: quota(admin)["tokens_month_used"] == 58)
    second = await acme.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == 47
    await eventually_async(lambda: quota(admin)["tokens_month_used"] == 58 + 23)  # 1 + 10 + 47/4, rounded up
    assert quota(admin)["open_reservations"] == 0
    with pytest.raises(openai.RateLimitError):
        await acme.completions.create(model=MODEL, prompt=PROMPT, max_tokens=900)
    await acme.close()


async def test_many_answers_to_one_prompt_are_one_request_with_one_prompt(
    node: RunningNode, admin: Administration
) -> None:
    acme = await client(node, admin, tokens_per_month=1000, requests_per_minute=1)
    answer = await acme.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, n=3, temperature=1)
    assert len(answer.choices) == 3
    await eventually_async(lambda: quota(admin)["tokens_month_used"] == 48 + 15)
    await acme.close()


async def test_parallel_requests_wait_for_their_turn(
    node: RunningNode, admin: Administration, worker: StandInWorker
) -> None:
    acme = await client(node, admin, parallel_requests=2)
    worker.token_delay_s = 0.05
    asked = [acme.completions.create(model=MODEL, prompt=[n, n], max_tokens=4) for n in range(1, 7)]
    tasks = [asyncio.ensure_future(one) for one in asked]
    await eventually_async(lambda: len(worker.requests) >= 2)
    assert node.node.inference.admission.running <= 2
    assert len(await asyncio.gather(*tasks)) == 6
    await eventually_async(lambda: quota(admin)["parallel_used"] == 0)
    await acme.close()


async def test_a_statement_is_charged_for_the_answers_it_asked_for(
    node: RunningNode, admin: Administration, metadata: str
) -> None:
    admin.create_tenant("acme", {})
    admin.set_limits("acme", {"tokens_per_month": 1000, "requests_per_minute": 100})
    with psycopg.connect(metadata, autocommit=True) as connection:
        connection.execute("CREATE ROLE acme_role LOGIN")
        mapped = admin.map_role("acme", "acme_role", metadata)
        connection.execute("DROP ROLE acme_role")
    await eventually_async(lambda: bool(node.node.tenants._snapshot.roles))
    login = Login("acme_role", mapped["oid"], mapped["cluster"])
    sql = SqlInference(node.node.inference, node.node.tenants)

    def calls(number: int) -> list[InferCall]:
        return [
            InferCall("Hi", None, {"max_tokens": 10}, "r", "d", "s", login=login, charge=Charge())
            for _ in range(number)
        ]

    with pytest.raises(QuotaExceeded):
        await sql.reserve(calls(60))
    window = await sql.reserve(calls(5))
    asked, dropped, never_run, *rest = window
    await sql.infer_text(asked)
    await sql.infer_text(dropped)
    for call in rest:
        assert call.charge is not None
        call.charge.decide(False)
    for call, is_due in ((asked, True), (dropped, False), (never_run, False)):
        assert call.charge is not None
        call.charge.decide(is_due)
    await eventually_async(lambda: quota(admin)["open_reservations"] == 0)
    prompt_tokens = node.node.inference.scheduler.decisions[-1].prompt_tokens
    await eventually_async(lambda: quota(admin)["tokens_month_used"] == prompt_tokens + 10)


async def test_a_turn_over_its_quota_leaves_the_conversation_as_it_was_and_may_be_asked_again(
    node: RunningNode, admin: Administration, metadata: str
) -> None:
    acme = await client(node, admin, tokens_per_month=60)
    with psycopg.connect(metadata, autocommit=True) as connection:
        connection.execute("CREATE ROLE acme_role LOGIN")
        mapped = admin.map_role("acme", "acme_role", metadata)
        connection.execute("DROP ROLE acme_role")
    await eventually_async(lambda: bool(node.node.tenants._snapshot.roles))
    conversation = await acme.conversations.create(metadata={"kept": "yes"})
    headers = {"authorization": f"Bearer {acme.api_key}"}

    async def by_rest() -> int:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}
        path = f"/v1/conversations/{conversation.id}/messages"
        async with node.http.post(path, json=body, headers=headers) as response:
            return response.status

    chat = SqlConversations(node.node.conversations, node.node.tenants).topics()["chat"]
    login = Login("acme_role", mapped["oid"], mapped["cluster"])
    payload = {"conversation": conversation.id, "message": "Hi", "turn": "t1", "options": {"max_tokens": 100}}
    by_sql = Asked(payload, "acme_role", "d", "s", login)
    assert await by_rest() == 429
    with pytest.raises(QuotaExceeded) as refused:
        await chat.answer(by_sql)
    assert refused.value.sqlstate == "53400"
    left = await acme.conversations.retrieve(conversation.id)
    assert left == conversation
    assert [item async for item in acme.conversations.items.list(conversation.id)] == []
    admin.set_limits("acme", {"tokens_per_month": 1000})
    await eventually_async(lambda: admin.quotas("acme")[0]["open_reservations"] == 0)

    async def is_taken() -> bool:
        return await by_rest() == 200

    await eventually_async(is_taken, what="the new limit is known")
    answer = await chat.answer(by_sql)
    assert await chat.answer(by_sql) == answer, "the same turn is not taken twice"
    assert len([item async for item in acme.conversations.items.list(conversation.id)]) == 4
    await acme.close()


async def test_what_a_dead_node_has_left_open_is_settled_from_the_workers_journals(
    node: RunningNode, admin: Administration, metadata: str, worker: StandInWorker
) -> None:
    admin.create_tenant("acme", {})
    admin.set_limits("acme", {"tokens_per_month": 1000})
    with psycopg.connect(metadata, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO stratakv.quota_nodes (node, seen_at) VALUES ('dead', now() - interval '1 hour');"
            "INSERT INTO stratakv.quota_state (tenant_id, kind, held_micros)"
            " SELECT id, 'tokens_month', 300000000 FROM stratakv.tenants WHERE name = 'acme';"
            "INSERT INTO stratakv.quota_leases SELECT 'dead', id, 'tokens_month', 100000000 FROM stratakv.tenants"
            " WHERE name = 'acme';"
            "INSERT INTO stratakv.reservations (request_id, node, tenant_id, kinds, reserved_micros)"
            " SELECT r, 'dead', id, '{tokens_month}', 100000000 FROM stratakv.tenants, unnest('{cmpl-a,cmpl-b}'::text[]) r"
            " WHERE name = 'acme'"
        )
    tokens = {"prompt_tokens": 20, "cached_tokens": 0}
    worker.journal += [
        {"request_id": "cmpl-a-0", **tokens, "generated_tokens": 3},
        {"request_id": "cmpl-a-1", **tokens, "generated_tokens": 4},
    ]
    await eventually_async(lambda: quota(admin)["open_reservations"] == 0, timeout_s=30)
    assert quota(admin)["tokens_month_used"] == 27 + 100
    assert quota(admin)["unsettled_reservations"] == 1
