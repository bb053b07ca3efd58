"""Several answers, log-probabilities, tools, times: by OpenAI's own client, whole and streamed, over stand-in workers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from stratakv.text import decode, encode
from tests.integration.dbnode.running_node import PoolOfBlocks, RunningNode, running_node
from tests.stand_in_worker import MODEL, StandInWorker, expected_tokens, logprob_at
from tests.support import eventually_async

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    },
    {"type": "function", "function": {"name": "time", "description": "The time now."}},
]
USAGE: Any = {"include_usage": True}


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[StandInWorker]:
    worker = await StandInWorker("w0").start()
    yield worker
    await worker.stop()


@pytest_asyncio.fixture
async def node(worker: StandInWorker) -> AsyncIterator[RunningNode]:
    async with running_node(worker) as node:
        yield node


def text_of(node: RunningNode, token_ids: list[int]) -> str:
    return decode(node.node.inference.tokens.tokenizer, token_ids)


def answers_with(node: RunningNode, worker: StandInWorker, text: str) -> None:
    worker.answer = encode(node.node.inference.tokens.tokenizer, text, special=False)
    worker.finish_reason = "stop"


# --- several answers --------------------------------------------------------------------------------------------------


async def test_n_answers_share_the_prompt_and_are_counted_once(node: RunningNode, worker: StandInWorker) -> None:
    prompt = list(range(100, 180))
    answer = await node.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=4, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (80, 12)
    assert [request["prompt"] for request in worker.requests] == [prompt] * 3
    seeds = [request["seed"] for request in worker.requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


async def test_later_answers_start_when_the_prompt_is_computed(node: RunningNode, worker: StandInWorker) -> None:
    worker.hang = True
    task = node.openai.completions.create(model=MODEL, prompt="x", max_tokens=2, n=3, timeout=1.0)
    with pytest.raises(openai.APITimeoutError):
        await task
    assert len(worker.requests) == 1
    await eventually_async(lambda: node.node.inference.in_flight == 0)


async def test_streamed_answers_carry_their_index_and_end_once(node: RunningNode, worker: StandInWorker) -> None:
    stream = await node.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=6, n=3, stream=True, stream_options=USAGE
    )
    chunks = [chunk async for chunk in stream]
    expected = text_of(node, expected_tokens(worker.requests[0]["prompt"], 6))
    for index in range(3):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == expected
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["length"]
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [18]


async def test_several_prompts_are_answered_in_order(node: RunningNode, worker: StandInWorker) -> None:
    prompts = [list(range(100, 130)), list(range(200, 240))]
    answer = await node.openai.completions.create(model=MODEL, prompt=prompts, max_tokens=3, n=2)
    expected = [text_of(node, expected_tokens(prompt, 3)) for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 70


async def test_one_failed_answer_fails_them_all(node: RunningNode, worker: StandInWorker) -> None:
    worker.refuse_status = 400
    with pytest.raises(openai.BadRequestError):
        await node.openai.completions.create(model=MODEL, prompt="x", max_tokens=2, n=4)
    assert node.node.inference.in_flight == 0
    assert node.node.inference.admission.running == 0


async def test_a_disconnect_cancels_every_answer(node: RunningNode, worker: StandInWorker) -> None:
    worker.token_delay_s = 0.01
    body = {"messages": HELLO, "max_tokens": 3000, "stream": True, "n": 3}
    response = await node.http.post("/v1/chat/completions", json=body)
    await eventually_async(lambda: len(worker.requests) == 3)
    response.close()
    await eventually_async(lambda: worker.cancelled == 3, what="cancelled in the worker")
    await eventually_async(lambda: node.node.inference.in_flight == 0)


# --- log-probabilities and sampling -----------------------------------------------------------------------------------


async def test_logprobs_of_a_chat_tell_tokens_bytes_and_the_likeliest(node: RunningNode, worker: StandInWorker) -> None:
    how: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    whole = await node.openai.chat.completions.create(**how)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content or []
    tokens = expected_tokens(worker.requests[0]["prompt"], 5)
    assert [entry.token for entry in content] == [text_of(node, [token]) for token in tokens]
    assert [entry.logprob for entry in content] == [logprob_at(index) for index in range(5)]
    assert b"".join(bytes(entry.bytes or ()) for entry in content).decode() == whole.choices[0].message.content
    assert [top.logprob for top in content[1].top_logprobs] == [logprob_at(1), logprob_at(1) - 1]
    stream = await node.openai.chat.completions.create(**how, stream=True)
    parts = [c.choices[0].logprobs async for c in stream if c.choices and c.choices[0].logprobs]
    assert [entry for part in parts for entry in part.content or []] == content


async def test_logprobs_of_a_completion_have_offsets_and_maps(node: RunningNode, worker: StandInWorker) -> None:
    how: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 4, "logprobs": 2}
    whole = await node.openai.completions.create(**how)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs == [logprob_at(index) for index in range(4)]
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:index])) for index in range(4)]
    assert [len(top) for top in logprobs.top_logprobs or []] == [2] * 4
    assert "".join(logprobs.tokens) == whole.choices[0].text
    stream = await node.openai.completions.create(**how, stream=True)
    parts = [c.choices[0].logprobs async for c in stream if c.choices and c.choices[0].logprobs]
    assert [offset for part in parts for offset in part.text_offset or []] == logprobs.text_offset


async def test_logprobs_of_tokens_that_were_sent_are_kept_when_a_worker_dies(worker: StandInWorker) -> None:
    other = await StandInWorker("w1", lose_after_tokens=3).start()
    worker.load = {"decode_step_s": 10.0, "prefill_tokens_per_s": 1.0}
    try:
        async with running_node(worker, other) as node:
            answer = await node.openai.completions.create(model=MODEL, prompt="Once", max_tokens=6, logprobs=0)
    finally:
        await other.stop()
    assert worker.requests[0]["kv_transfer_params"]["output_token_ids"] == expected_tokens(
        worker.requests[0]["prompt"], 3
    )
    assert worker.requests[0]["logprobs"] == 0
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == [logprob_at(index) for index in range(6)]


async def test_logprobs_go_with_a_prompt_that_is_computed_elsewhere() -> None:
    prefill, decode_ = await StandInWorker("p", role="prefill").start(), await StandInWorker("d", role="decode").start()
    try:
        async with running_node(prefill, decode_, meta=PoolOfBlocks()) as node:
            answer = await node.openai.completions.create(
                model=MODEL, prompt=list(range(1000, 1900)), max_tokens=4, logprobs=1, presence_penalty=0.5
            )
    finally:
        await prefill.stop()
        await decode_.stop()
    assert [len(prefill.requests), len(decode_.requests)] == [1, 1]
    assert decode_.requests[0]["presence_penalty"] == 0.5
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == [logprob_at(index) for index in range(4)]


async def test_penalties_and_biases_reach_the_worker(node: RunningNode, worker: StandInWorker) -> None:
    await node.openai.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"17": -100},
        extra_body={"repetition_penalty": 1.2},
    )
    sent = worker.requests[0]
    assert (sent["presence_penalty"], sent["frequency_penalty"], sent["repetition_penalty"]) == (0.5, -0.5, 1.2)
    assert sent["logit_bias"] == {"17": -100.0}


# --- tools ------------------------------------------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


async def test_a_call_the_model_decides_on_is_found(node: RunningNode, worker: StandInWorker) -> None:
    answers_with(node, worker, CALL)
    answer = await node.openai.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS, max_tokens=200)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    asked = text_of(node, worker.requests[0]["prompt"])
    assert '"name": "time"' in asked


async def test_streamed_calls_can_be_put_together(node: RunningNode, worker: StandInWorker) -> None:
    answers_with(node, worker, f"One moment.\n{CALL}\n{CALL}")
    async with node.openai.chat.completions.stream(model=MODEL, messages=HELLO, tools=TOOLS, max_tokens=300) as stream:
        events = [event async for event in stream]
        answer = await stream.get_final_completion()
    calls = answer.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls] == ["weather", "weather"]
    assert len({call.id for call in calls}) == 2
    assert answer.choices[0].message.content == "One moment.\n"
    assert answer.choices[0].finish_reason == "tool_calls"
    assert events


@pytest.mark.parametrize("stream", [False, True])
async def test_a_named_call_is_held_to_its_schema(node: RunningNode, worker: StandInWorker, stream: bool) -> None:
    answers_with(node, worker, '{"city": "Oslo"}')
    how: dict[str, Any] = {
        "model": MODEL,
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    }
    if stream:
        async with node.openai.chat.completions.stream(**how) as events:
            async for _ in events:
                pass
            choice: Any = (await events.get_final_completion()).choices[0]
    else:
        choice = (await node.openai.chat.completions.create(**how)).choices[0]
    assert worker.requests[0]["structured_outputs"]["json"] == TOOLS[0]["function"]["parameters"]
    assert choice.finish_reason == "stop"
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})


async def test_required_calls_are_held_to_the_functions(node: RunningNode, worker: StandInWorker) -> None:
    answers_with(node, worker, '[{"name": "time", "arguments": {}}]')
    answer = await node.openai.chat.completions.create(
        model=MODEL, messages=HELLO, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    schema = worker.requests[0]["structured_outputs"]["json"]
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert [call["properties"]["name"] for call in schema["items"]["anyOf"]] == [
        {"const": "weather"},
        {"const": "time"},
    ]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert [call.function.name for call in answer.choices[0].message.tool_calls or []] == ["time"]


async def test_calls_and_their_results_go_back_to_the_model(node: RunningNode, worker: StandInWorker) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    messages: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "half past nine"},
    ]
    await node.openai.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, max_tokens=2)
    asked = text_of(node, worker.requests[0]["prompt"])
    assert '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>' in asked
    assert "half past nine" in asked


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_tools_that_do_not_fit_are_refused_by_name(node: RunningNode, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await node.openai.chat.completions.create(model=MODEL, messages=HELLO, **fields)
    assert caught.value.param == param


# --- what stands beside an answer -------------------------------------------------------------------------------------

TIMES = {"time_to_first_token_ms", "queue_time_ms", "generation_time_ms", "mean_itl_ms", "cached_tokens"}


@pytest.mark.parametrize("stream", [False, True])
async def test_times_are_told_on_request(node: RunningNode, stream: bool) -> None:
    how: dict[str, Any] = {"model": MODEL, "prompt": list(range(100, 140)), "max_tokens": 4, "stream": stream}
    answer: Any = await node.openai.completions.create(**how, extra_headers={"X-StrataKV-Timing": "1"})
    last = [chunk async for chunk in answer][-1] if stream else answer
    metrics = last.model_dump()["metrics"]
    assert set(metrics) == TIMES
    assert metrics["time_to_first_token_ms"] > 0
    assert metrics["cached_tokens"] == {"l1": 0, "l2": 0, "pool": 0, "disk": 0}
    plain: Any = await node.openai.completions.create(**how)
    plain = [chunk async for chunk in plain][-1] if stream else plain
    assert "metrics" not in plain.model_dump()


async def test_the_trace_context_goes_on_to_the_worker(node: RunningNode, worker: StandInWorker) -> None:
    context = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for header in (context, "nonsense"):
        await node.openai.completions.create(
            model=MODEL, prompt="x", max_tokens=1, extra_headers={"traceparent": header}
        )
    assert worker.traceparents == [context, None]
