"""/v1/conversations as the openai package asks for it, what it refuses, and who may see what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import openai
import psycopg
import pytest
import pytest_asyncio

from stratakv import migrate
from stratakv.settings import RestSettings, Secret
from stratakv.tenancy.administration import Administration
from tests.integration.conversations.conftest import Query, call, contents, create, say
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import StandInWorker

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_openai_package_creates_reads_changes_and_deletes(node: RunningNode) -> None:
    client = node.openai.conversations
    made = await client.create(
        metadata={"topic": "demo"}, items=[{"type": "message", "role": "user", "content": "Hello!"}]
    )
    assert (await client.retrieve(made.id)).metadata == {"topic": "demo"}
    assert (await client.update(made.id, metadata={"topic": "other"})).metadata == {"topic": "other"}
    added = await client.items.create(
        made.id,
        items=[{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]}],  # type: ignore[typeddict-item, list-item]
    )
    assert [item.id for item in added.data] == [added.first_id]
    found = [item async for item in client.items.list(made.id, order="asc", limit=1)]
    assert [item.content[0].text for item in found] == ["Hello!", "Hi."]  # type: ignore[union-attr, index]
    one = await client.items.retrieve(found[1].id or "", conversation_id=made.id)
    assert one == found[1]
    gone = await client.delete(made.id)
    assert (gone.id, gone.deleted) == (made.id, True)
    with pytest.raises(openai.NotFoundError, match="no conversation"):
        await client.retrieve(made.id)


async def test_lists_come_in_pages_the_newest_first(node: RunningNode) -> None:
    made = [await create(node, f"{n}") for n in range(5)]
    _, first = await call(node, "GET", "?limit=3")
    _, second = await call(node, "GET", f"?limit=3&after={first['last_id']}")
    assert [one["id"] for one in first["data"] + second["data"]] == made[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    _, items = await call(node, "GET", f"/{made[0]}/items?limit=3")
    assert (len(items["data"]), items["has_more"]) == (1, False)


async def test_a_fork_goes_on_by_itself_from_an_item(node: RunningNode, worker: StandInWorker) -> None:
    origin = await create(node)
    await say(node, origin, "One?")
    _, items = await call(node, "GET", f"/{origin}/items?order=asc")
    status, fork = await call(node, "POST", f"/{origin}/fork", {"item_id": items["data"][1]["id"]})
    assert (status, fork["stratakv"]["forked_from"]) == (200, origin)
    await say(node, origin, "Two?")
    await say(node, fork["id"], "Three?")
    first = worker.requests[0]["prompt"]
    shared = len(first) + 8
    assert worker.requests[1]["prompt"][:shared] == worker.requests[2]["prompt"][:shared]
    assert [text for text in await contents(node, origin) if "?" in text] == ["One?", "Two?"]
    assert [text for text in await contents(node, fork["id"]) if "?" in text] == ["One?", "Three?"]


async def test_a_fork_of_a_fork_has_what_both_have_said(node: RunningNode, worker: StandInWorker) -> None:
    origin = await create(node)
    await say(node, origin, "One?")
    _, child = await call(node, "POST", f"/{origin}/fork", {})
    await say(node, child["id"], "Two?")
    _, grandchild = await call(node, "POST", f"/{child['id']}/fork", {})
    assert grandchild["stratakv"]["forked_from"] == child["id"]
    await call(node, "DELETE", f"/{origin}")
    await call(node, "DELETE", f"/{child['id']}")
    before = await contents(node, grandchild["id"])
    assert (await say(node, grandchild["id"], "Three?"))[0] == 200
    assert [text for text in before if "?" in text] == ["One?", "Two?"]
    second, third = (request["prompt"] for request in worker.requests[1:])
    assert third[: len(second) + 8][: len(second)] == second


REFUSED: list[tuple[str, str, Any, str]] = [
    ("POST", "", {"model": "x"}, "model"),
    ("POST", "", {"metadata": {"a": 1}}, "metadata"),
    ("POST", "", {"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ("POST", "", {"items": [{"type": "function_call", "name": "f"}]}, "items[0].type"),
    ("POST", "", {"items": [{"role": "tool", "content": "x"}]}, "items[0].role"),
    ("POST", "", {"items": [{"role": "user", "content": [{"type": "input_image"}]}]}, "items[0].content[0]"),
    ("POST", "", {"items": [{"role": "user", "content": "a\0b"}]}, "items[0].content"),
    ("POST", "", {"items": [{"role": "user", "content": "x", "phase": "y"}]}, "items[0].phase"),
    ("POST", "/ID", {}, "metadata"),
    ("POST", "/ID/items", {"items": []}, "items"),
    ("POST", "/ID/items", {"include": ["x"], "items": [{"role": "user", "content": "x"}]}, "include"),
    ("POST", "/ID/messages", {}, "messages"),
    ("POST", "/ID/messages", {"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
    ("GET", "/ID/items?include=x", None, "include"),
    ("GET", "/ID/items?limit=101", None, "limit"),
    ("GET", "/ID/items?order=up", None, "order"),
]
"""Method, path, body → the field that is named."""
MISSING = (
    "/conv_none",
    "/a%00b",
    "/ID/items/a%00b",
    "/conv_none/items",
    "/ID/items/msg_none",
    "/ID/items?after=msg_none",
)


async def test_what_is_not_supported_is_refused_by_name(node: RunningNode) -> None:
    conversation = await create(node)
    for method, path, body, param in REFUSED:
        status, answer = await call(node, method, path.replace("ID", conversation), body)
        assert (status, answer["error"]["param"]) == (400, param), path


async def test_what_is_not_there_is_not_found(node: RunningNode) -> None:
    conversation = await create(node)
    for path in MISSING:
        status, answer = await call(node, "GET", path.replace("ID", conversation))
        assert (status, answer["error"]["code"]) == (404, "conversation_not_found"), path


@pytest_asyncio.fixture(loop_scope="module")
async def shared(worker: StandInWorker, postgres_url: str) -> AsyncIterator[tuple[RunningNode, str, str]]:
    """A node with a database of its own, and the keys of two tenants."""
    await asyncio.to_thread(migrate.upgrade, postgres_url)
    with Administration(postgres_url, "test") as admin:
        keys = []
        for tenant in ("acme", "bolt"):
            admin.create_tenant(tenant, {})
            keys.append(admin.create_key(tenant, "k").key)
    async with running_node(
        worker, database_url=postgres_url, rest=replace(RestSettings(), api_key=Secret("operator"))
    ) as running:
        yield running, keys[0], keys[1]


async def test_another_tenants_conversation_is_as_if_it_were_not_there(shared: tuple[RunningNode, str, str]) -> None:
    node, acme, bolt = shared
    mine, theirs = {"Authorization": f"Bearer {acme}"}, {"Authorization": f"Bearer {bolt}"}
    _, made = await call(node, "POST", "", {"items": [{"role": "user", "content": "secret"}]}, **mine)
    _, items = await call(node, "GET", f"/{made['id']}/items", **mine)
    turn = {"messages": [{"role": "user", "content": "What did I say?"}], "max_tokens": 4}
    attempts = [
        ("GET", "", None),
        ("POST", "", {"metadata": {}}),
        ("DELETE", "", None),
        ("GET", "/items", None),
        ("GET", f"/items/{items['first_id']}", None),
        ("POST", "/items", {"items": [{"role": "user", "content": "x"}]}),
        ("POST", "/fork", {}),
        ("POST", "/messages", turn),
    ]
    for method, path, body in attempts:
        missing = await call(node, method, f"/conv_none{path}", body, **theirs)
        status, answer = await call(node, method, f"/{made['id']}{path}", body, **theirs)
        assert status == missing[0] == 404, path
        assert answer["error"]["message"].replace(made["id"], "conv_none") == missing[1]["error"]["message"]
    assert (await call(node, "GET", "", **theirs))[1]["data"] == []
    _, listed = await call(node, "GET", f"?after={made['id']}", **theirs)
    assert listed["data"] == []
    assert (await call(node, "GET", f"/{made['id']}/items", **mine))[1] == items


async def test_what_nobody_adds_to_ends_and_is_cleared_away(node: RunningNode, query: Query) -> None:
    ended, used = await create(node, "a"), await create(node, "b")
    query("UPDATE stratakv.conversations SET expires_at = now() - interval '1 second' WHERE id = %s", ended)
    query("UPDATE stratakv.conversations SET expires_at = now() + interval '1 minute' WHERE id = %s", used)
    assert (await call(node, "GET", f"/{ended}"))[0] == 404
    assert (await say(node, ended, "Still there?"))[0] == 404
    await say(node, used, "Go on.")
    await node.node.conversations.store.sweep()
    assert query("SELECT id FROM stratakv.conversations") == [(used,)]
    assert query("SELECT count(*) FROM stratakv.conversation_items WHERE conversation_id = %s", ended) == [(0,)]
    assert query("SELECT expires_at > now() + interval '29 days' FROM stratakv.conversations") == [(True,)]


async def test_those_of_a_deleted_tenant_are_cleared_away(
    shared: tuple[RunningNode, str, str], postgres_url: str
) -> None:
    node, acme, bolt = shared
    for key in (acme, bolt):
        await call(node, "POST", "", **{"Authorization": f"Bearer {key}"})
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute("UPDATE stratakv.tenants SET deleted_at = now() WHERE name = 'acme'")
        assert await node.node.conversations.store.sweep() == 1
        left = admin.execute(
            "SELECT t.name FROM stratakv.conversations c JOIN stratakv.tenants t ON t.id = c.tenant_id"
        ).fetchall()
    assert left == [("bolt",)]


async def test_without_its_database_a_db_node_says_so(worker: StandInWorker) -> None:
    async with running_node(worker) as node:
        status, answer = await call(node, "POST", "")
    assert (status, answer["error"]["code"]) == (503, "unavailable")
