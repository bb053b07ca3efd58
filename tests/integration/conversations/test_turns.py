"""Turns: the same tokens again, whole or not at all, one at a time, and for their tenant only."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest

from tests.integration.conversations.conftest import Query, call, contents, create, say
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import MODEL, StandInWorker, expected_tokens
from tests.support import eventually_async

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_next_prompt_begins_with_the_tokens_of_the_last_prompt_and_answer(
    node: RunningNode, worker: StandInWorker
) -> None:
    conversation = await create(node, "You are terse.")
    for text in ("What is a block?", "And a page?", "And a slot?"):
        status, answer = await say(node, conversation, text, max_tokens=20)
        assert status == 200, answer
    prompts = [request["prompt"] for request in worker.requests]
    for before, after in itertools.pairwise(prompts):
        said = before + expected_tokens(before, 20)
        assert after[: len(said)] == said
        assert len(after) > len(said)


async def test_a_turn_asks_what_a_chat_with_the_same_messages_asks(node: RunningNode, worker: StandInWorker) -> None:
    """The text behind the tokens is what the chat template makes of the same messages."""
    conversation = await create(node)
    await say(node, conversation, "One?")
    await say(node, conversation, "Two?")
    texts = await contents(node, conversation)
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    await node.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)  # type: ignore[arg-type]
    decode = node.node.inference.tokens.text_of
    assert await decode(worker.requests[1]["prompt"]) == await decode(worker.requests[2]["prompt"])


async def test_any_db_node_takes_the_next_turn_with_the_same_tokens(
    node: RunningNode, worker: StandInWorker, database_url: str
) -> None:
    conversation = await create(node)
    await say(node, conversation, "One?")
    async with running_node(worker, database_url=database_url) as other:
        status, _ = await say(other, conversation, "Two?")
    assert status == 200
    first, second = (request["prompt"] for request in worker.requests)
    said = first + expected_tokens(first, 8)
    assert second[: len(said)] == said


async def test_a_stop_string_cuts_the_answer_and_its_tokens_are_made_anew(
    node: RunningNode, worker: StandInWorker
) -> None:
    conversation = await create(node)
    _, whole = await say(node, conversation, "One?", max_tokens=12)
    text = whole["choices"][0]["message"]["content"]
    other = await create(node)
    _, cut = await say(node, other, "One?", max_tokens=12, stop=[text[5:8]])
    said = cut["choices"][0]["message"]["content"]
    assert said == text[: text.index(text[5:8])]
    await say(node, other, "Two?")
    assert await contents(node, other) == ["One?", said, "Two?", (await contents(node, other))[3]]
    prompt = await node.node.inference.tokens.text_of(worker.requests[-1]["prompt"])
    assert f"assistant\n{said}<|im_end|>" in prompt


async def test_a_streamed_turn_is_kept_before_its_last_event(node: RunningNode) -> None:
    conversation = await create(node)
    body = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 6, "stream": True}
    text = ""
    async with node.http.post(f"/v1/conversations/{conversation}/messages", json=body) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            if line.startswith(b"data: [DONE]"):
                break
    assert await contents(node, conversation) == ["Go", text]


async def test_of_two_turns_at_once_one_is_told_to_wait(node: RunningNode, worker: StandInWorker) -> None:
    worker.token_delay_s = 0.1
    conversation = await create(node)
    answers = await asyncio.gather(*(say(node, conversation, f"{n}?") for n in range(2)))
    assert sorted(status for status, _ in answers) == [200, 409]
    (refused,) = (body for status, body in answers if status == 409)
    assert refused["error"]["code"] == "conversation_busy"
    assert len(await contents(node, conversation)) == 2
    worker.token_delay_s = 0.0
    assert (await say(node, conversation, "Again?"))[0] == 200


async def test_a_turn_that_expects_another_version_is_refused(node: RunningNode) -> None:
    conversation = await create(node)
    assert (await say(node, conversation, "One?", version=0))[0] == 200
    status, body = await say(node, conversation, "Two?", version=0)
    assert (status, body["error"]["code"]) == (409, "conversation_changed")
    assert (await say(node, conversation, "Two?", version=1))[0] == 200


async def test_a_turn_that_fails_leaves_nothing_and_may_be_tried_again(
    node: RunningNode, worker: StandInWorker
) -> None:
    conversation = await create(node)
    worker.refuse_status = 500
    status, _ = await say(node, conversation, "One?")
    assert status != 200
    worker.refuse_status = None
    assert await contents(node, conversation) == []
    assert (await say(node, conversation, "One?"))[0] == 200


async def test_a_client_that_goes_away_leaves_the_conversation_free(node: RunningNode, worker: StandInWorker) -> None:
    conversation = await create(node)
    worker.token_delay_s = 0.2
    asking = asyncio.create_task(say(node, conversation, "One?", max_tokens=100))
    await eventually_async(lambda: worker.requests, what="the worker has the request")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    worker.token_delay_s = 0.0

    async def is_free() -> bool:
        return (await say(node, conversation, "Two?"))[0] == 200

    await eventually_async(is_free, what="the turn is given up")
    assert (await contents(node, conversation))[0] == "Two?"


async def test_a_turn_may_last_longer_than_the_conversation(
    node: RunningNode, worker: StandInWorker, query: Query
) -> None:
    worker.token_delay_s = 0.1
    conversation = await create(node)
    turn = asyncio.create_task(say(node, conversation, "Slow?", max_tokens=6))
    await eventually_async(lambda: worker.requests, what="the worker has the request")
    query("UPDATE stratakv.conversations SET expires_at = now() - interval '1 second'")
    await node.node.conversations.store.sweep()
    assert (await turn)[0] == 200
    assert query("SELECT expires_at > now() + interval '29 days' FROM stratakv.conversations") == [(True,)]
    assert len(await contents(node, conversation)) == 2


async def test_a_conversation_that_ended_during_a_turn_that_failed_is_gone(
    node: RunningNode, worker: StandInWorker, query: Query
) -> None:
    worker.token_delay_s = 0.2
    conversation = await create(node)
    turn = asyncio.create_task(say(node, conversation, "Slow?", max_tokens=100))
    await eventually_async(lambda: worker.requests, what="the worker has the request")
    query("UPDATE stratakv.conversations SET expires_at = now() - interval '1 second'")
    turn.cancel()
    await asyncio.gather(turn, return_exceptions=True)

    async def is_gone() -> bool:
        return (await call(node, "GET", f"/{conversation}"))[0] == 404

    await eventually_async(is_gone, what="the turn is given up")


async def test_a_conversation_that_is_deleted_in_the_middle_of_a_turn_ends_it(
    node: RunningNode, worker: StandInWorker
) -> None:
    worker.token_delay_s = 0.05
    conversation = await create(node)
    turn = asyncio.create_task(say(node, conversation, "Slow?"))
    await eventually_async(lambda: worker.requests, what="the worker has the request")
    assert (await call(node, "DELETE", f"/{conversation}"))[0] == 200
    status, body = await turn
    assert (status, body["error"]["code"]) == (404, "conversation_not_found")


async def test_two_db_nodes_take_turns_one_at_a_time(
    node: RunningNode, worker: StandInWorker, database_url: str
) -> None:
    conversation = await create(node)
    async with running_node(worker, database_url=database_url) as other:
        worker.token_delay_s = 0.05
        first = asyncio.create_task(say(node, conversation, "One?"))
        await eventually_async(lambda: worker.requests, what="the worker has the request")
        status, body = await say(other, conversation, "Two?")
        assert (status, body["error"]["code"]) == (409, "conversation_busy")
        added = {"items": [{"role": "user", "content": "x"}]}
        assert (await call(other, "POST", f"/{conversation}/items", added))[0] == 409
        assert (await first)[0] == 200
        worker.token_delay_s = 0.0
        answers = await asyncio.gather(*(say(at, conversation, f"{n}?") for n, at in enumerate((node, other) * 4)))
        num_taken = sum(status == 200 for status, _ in answers)
        assert {status for status, _ in answers} <= {200, 409}
        assert await contents(other, conversation) == await contents(node, conversation)
    assert num_taken >= 1
    assert len(await contents(node, conversation)) == 2 + 2 * num_taken


async def test_a_system_message_in_the_middle_is_said_to_the_model(node: RunningNode, worker: StandInWorker) -> None:
    conversation = await create(node, "Hello", "Hi.")
    await call(node, "POST", f"/{conversation}/items", {"items": [{"role": "system", "content": "Be terse."}]})
    status, _ = await say(node, conversation, "Why?")
    assert status == 200
    prompt = await node.node.inference.tokens.text_of(worker.requests[-1]["prompt"])
    assert "Hi.<|im_end|>\n<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nWhy?" in prompt


async def test_turns_are_counted_by_how_they_ended(node: RunningNode, worker: StandInWorker) -> None:
    async def count(outcome: str, error: str = "") -> float:
        labels = f'{{error="{error}",outcome="{outcome}",source="rest"}}'
        async with node.http.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        found = [line for line in lines if line.startswith(f"stratakv_conversation_turns_total{labels}")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    before = await count("completed"), await count("failed", "conversation_not_found")
    conversation = await create(node)
    await say(node, conversation, "One?")
    await say(node, "conv_none", "One?")
    assert (await count("completed"), await count("failed", "conversation_not_found")) == (before[0] + 1, before[1] + 1)
    assert await node.node.conversations.store.count_open() == 1


async def test_a_turn_whose_db_node_died_blocks_for_its_time_only(node: RunningNode, query: Query) -> None:
    conversation = await create(node)
    query("UPDATE stratakv.conversations SET turn_id = 'dead', turn_ends_at = now() + interval '1 hour'")
    assert (await say(node, conversation, "One?"))[0] == 409
    query("UPDATE stratakv.conversations SET turn_ends_at = now() - interval '1 second'")
    assert (await say(node, conversation, "One?"))[0] == 200


async def test_a_turn_that_was_overtaken_is_not_added(node: RunningNode, worker: StandInWorker, query: Query) -> None:
    conversation = await create(node)
    worker.token_delay_s = 0.1
    slow = asyncio.create_task(say(node, conversation, "Slow?"))
    await eventually_async(lambda: worker.requests, what="the worker has the request")
    query("UPDATE stratakv.conversations SET turn_ends_at = now() - interval '1 second'")
    worker.token_delay_s = 0.0
    assert (await say(node, conversation, "Quick?"))[0] == 200
    status, body = await slow
    assert (status, body["error"]["code"]) == (409, "conversation_busy")
    assert (await contents(node, conversation))[0] == "Quick?"


async def test_what_a_turn_does_not_take_is_refused_by_name(node: RunningNode) -> None:
    conversation = await create(node)
    refused: dict[str, Any] = {"n": 2, "tools": [{"type": "function"}], "echo": True, "item": "x", "version": -1}
    for field, value in refused.items():
        status, body = await say(node, conversation, "One?", **{field: value})
        assert (status, body["error"]["param"]) == (400, field)


async def test_length_and_number_are_bounded(node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    store = node.node.conversations.store
    monkeypatch.setattr(store, "_settings", replace(store._settings, items_max=3, bytes_max=20, per_tenant_max=2))
    conversation = await create(node)
    status, body = await say(node, conversation, "x" * 21)
    assert (status, body["error"]["code"]) == (400, "conversation_full")
    await create(node, "a", "b", "c")
    status, body = await call(node, "POST", "")
    assert (status, body["error"]["code"]) == (429, "too_many_conversations")
    status, body = await call(node, "POST", f"/{conversation}/items", {"items": [{"role": "user", "content": "a"}] * 4})
    assert (status, body["error"]["code"]) == (400, "conversation_full")
