"""Typed answers between SQL or REST and the workers: what workers are told, and what becomes of answers that do not fit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from dbnode.errors import AnswerCut, AnswerUnfit
from dbnode.sql.service import InferCall, NullAnswer
from dbnode.sql_inference import SqlInference
from stratakv.errors import ContextTooLong, DeadlineExceeded, InvalidRequest, ModelNotFound, StrataError
from stratakv.text import decode, encode
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import MAX_MODEL_LEN, MODEL, StandInWorker, expected_tokens
from tests.support import eventually_async

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[StandInWorker]:
    worker = await StandInWorker("w0").start()
    yield worker
    await worker.stop()


@pytest_asyncio.fixture
async def node(worker: StandInWorker) -> AsyncIterator[RunningNode]:
    async with running_node(worker) as node:
        yield node


async def infer(node: RunningNode, prompt: str = "Hello", model: str | None = None, **options: Any) -> str:
    named = {name.replace("at_", "@"): value for name, value in options.items()}
    return await SqlInference(node.node.inference, node.node.tenants).infer_text(
        InferCall(prompt, model, named, "role", "db", "s")
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"json": {"type": "object"}}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}, {"json": SCHEMA}),
    ],
)
async def test_response_format_reaches_the_worker(
    node: RunningNode, worker: StandInWorker, given: Any, told: Any
) -> None:
    await node.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, response_format=given)
    assert worker.requests[0].get("structured_outputs") == told
    assert json.dumps(told) == json.dumps(worker.requests[0].get("structured_outputs")), "order of properties"


async def test_typed_sql_reaches_the_worker(node: RunningNode, worker: StandInWorker) -> None:
    for form in ({"at_json_schema": SCHEMA}, {"at_choices": ["a", "b"]}):
        with pytest.raises(AnswerCut):  # the stand-in always goes on to max_tokens
            await infer(node, max_tokens=2, **form)
    assert [r["structured_outputs"] for r in worker.requests] == [{"json": SCHEMA}, {"choice": ["a", "b"]}]


async def test_salt_reaches_the_worker_and_keeps_its_prompts_apart(node: RunningNode, worker: StandInWorker) -> None:
    prompt = "one two three four " * 40
    for salt in ("a", None, "a"):
        await infer(node, prompt, max_tokens=2, cache_salt=salt, priority=-1)
        extra: Any = {"cache_salt": salt, "priority": 3}
        await node.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, extra_body=extra)
    salts = ["a", "a", None, None, "a", "a"]
    assert [request.get("cache_salt") for request in worker.requests] == salts
    uncached = [
        decision.uncached_tokens for decision in node.node.inference.scheduler.decisions if decision.prompt_tokens > 64
    ]
    assert uncached[0] == uncached[1] > uncached[2]


async def test_fold_asks_in_prompts_that_fit_until_one_answer_is_left(node: RunningNode, worker: StandInWorker) -> None:
    pieces = [f"piece {i}: " + "some words about it " * 40 for i in range(120)]
    prompt = json.dumps({"instruction": "Sum up.", "pieces": [*pieces, "one long piece " * 3000]})
    await infer(node, prompt, max_tokens=50, at_fold=True)
    lengths = [len(request["prompt"]) for request in worker.requests]
    assert all(length + 50 <= MAX_MODEL_LEN for length in lengths)
    assert max(lengths[:-1]) > MAX_MODEL_LEN * 0.75, "prompts are filled"
    assert 7 <= len(lengths) <= 15
    assert lengths[-1] < 50 * len(lengths) + 100, "the last one is about the answers"


async def test_fold_that_is_given_up_stops_all_its_prompts(node: RunningNode, worker: StandInWorker) -> None:
    worker.token_delay_s = 0.5
    prompt = json.dumps({"instruction": "Sum up.", "pieces": ["some words about it " * 900] * 3})
    running = asyncio.create_task(infer(node, prompt, max_tokens=100, at_fold=True))
    await eventually_async(lambda: len(worker.requests) == 3)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await eventually_async(lambda: worker.cancelled == 3)


async def test_fold_failures_are_told_as_those_of_one_row(node: RunningNode, worker: StandInWorker) -> None:
    prompt = json.dumps({"instruction": "Sum up.", "pieces": ["some words about it " * 900] * 3})
    with pytest.raises(ContextTooLong, match="infer_agg"):
        await infer(node, prompt, max_tokens=1500, at_fold=True)
    with pytest.raises(NullAnswer):
        await infer(node, prompt, max_tokens=1500, at_fold=True, on_error="null")
    with pytest.raises(InvalidRequest, match="@choices"):
        await infer(node, prompt, at_fold=True, at_choices=["a"])
    assert worker.requests == []


async def test_answer_that_was_cut_is_an_error_that_names_max_tokens(node: RunningNode) -> None:
    with pytest.raises(AnswerCut, match="max_tokens") as caught:
        await infer(node, at_choices=["a"])
    assert caught.value.sqlstate == "54000"


@pytest.mark.parametrize("form", [{"at_choices": ["a"]}, {"at_json_schema": SCHEMA}])
async def test_answer_of_another_form_is_never_handed_on(
    node: RunningNode, worker: StandInWorker, form: dict[str, Any]
) -> None:
    worker.finish_reason = "stop"
    with pytest.raises(AnswerUnfit):
        await infer(node, max_tokens=2, **form)


async def test_failed_row_is_null_or_detail_where_asked(node: RunningNode, worker: StandInWorker) -> None:
    with pytest.raises(NullAnswer):
        await infer(node, on_error="null", at_choices=["a"])
    detail = json.loads(await infer(node, on_error="detail", at_json_schema=SCHEMA))
    assert (detail["error"]["sqlstate"], detail["error"]["code"]) == ("54000", "answer_cut")
    with pytest.raises(NullAnswer):
        await infer(node, "word " * MAX_MODEL_LEN, on_error="null")
    worker.token_delay_s = 0.2
    with pytest.raises(NullAnswer):
        await infer(node, on_error="null", timeout_ms=50)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"prompt": "word " * MAX_MODEL_LEN}, ContextTooLong),
        ({"timeout_ms": 1, "max_tokens": 500, "on_error": "raise"}, DeadlineExceeded),
        ({"model": "another", "on_error": "null"}, ModelNotFound),
        ({"made_up": 1, "on_error": "null"}, InvalidRequest),
    ],
)
async def test_other_errors_are_raised(node: RunningNode, call: dict[str, Any], error: type[StrataError]) -> None:
    with pytest.raises(error) as caught:
        await infer(node, **call)
    assert not isinstance(caught.value, NullAnswer)


async def test_tokens_are_counted_without_a_worker_and_without_a_chat_around_them() -> None:
    async with running_node() as node:
        tokenizer = node.node.inference.tokens.tokenizer
        for text in ("", "Hello world", "<|im_start|>", "é☕ " * 5000):
            assert await infer(node, text, at_count_tokens=True) == str(len(encode(tokenizer, text, special=False)))
        with pytest.raises(ModelNotFound):
            await infer(node, model="another", at_count_tokens=True)


async def test_right_choice_is_handed_on(node: RunningNode, worker: StandInWorker) -> None:
    worker.finish_reason = "stop"
    await node.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
    text = decode(node.node.inference.tokens.tokenizer, expected_tokens(worker.requests[0]["prompt"], 2))
    assert await infer(node, max_tokens=2, at_choices=["a", text]) == text
