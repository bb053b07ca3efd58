"""What the openai package offers around a request, by its sync and its async client: ids, errors by class, retries, time-outs,
parsing, tools, cancelling. Over a stand-in worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pydantic
import pytest
import pytest_asyncio

from stratakv.settings import RestSettings, Secret
from stratakv.text import encode
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import MODEL, StandInWorker
from tests.support import eventually_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "key-1"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 4}


class City(pydantic.BaseModel):
    """Where."""

    name: str


class Served:
    """A node, its worker, and clients of both kinds."""

    def __init__(self, node: RunningNode, worker: StandInWorker) -> None:
        self.node = node
        self.worker = worker
        self.client = node.openai

    def sync(self, **how: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.node.url}/v1", "api_key": KEY, "max_retries": 0} | how)

    def answers(self, text: str) -> None:
        """Says this from now on, to the end."""
        self.worker.answer = encode(self.node.node.inference.tokens.tokenizer, text, special=False)
        self.worker.finish_reason = "stop"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Served]:
    worker = await StandInWorker("w0").start()
    async with running_node(worker, rest=RestSettings(api_key=Secret(KEY), requests_max=2)) as node:
        yield Served(node, worker)
    await worker.stop()


@pytest.fixture
def served(shared: Served) -> Served:
    """As if it had just started."""
    worker = shared.worker
    worker.requests.clear()
    worker.answer, worker.finish_reason, worker.token_delay_s = None, "length", 0.0
    worker.lose_after_tokens, worker.cancelled = None, 0
    return shared


async def test_the_request_id_is_the_one_that_was_sent_or_a_new_one(served: Served) -> None:
    answer = await served.client.chat.completions.create(**CHAT, extra_headers={"X-Request-Id": "mine-1"})
    assert answer._request_id == "mine-1"
    other = await served.client.completions.create(model=MODEL, prompt="x", max_tokens=1)
    assert other._request_id not in (None, "mine-1")
    with pytest.raises(openai.BadRequestError) as caught:
        await served.client.chat.completions.create(**CHAT | {"n": 200}, extra_headers={"X-Request-Id": "mine-2"})
    assert caught.value.request_id == "mine-2"


def failing(served: Served, what: dict[str, Any], key: str = KEY) -> openai.APIStatusError:
    with served.sync(api_key=key) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**CHAT | what)
    return caught.value


@pytest.mark.parametrize(
    ("what", "key", "kind", "code"),
    [
        ({"temperature": 9}, KEY, openai.BadRequestError, "invalid_request"),
        ({"max_tokens": 10**6}, KEY, openai.BadRequestError, "context_length_exceeded"),
        ({}, "wrong", openai.AuthenticationError, "invalid_api_key"),
        ({"model": "other"}, KEY, openai.NotFoundError, "model_not_found"),
    ],
)
async def test_errors_are_of_the_packages_classes(
    served: Served, what: dict[str, Any], key: str, kind: type[openai.APIStatusError], code: str
) -> None:
    error = await asyncio.to_thread(failing, served, what, key)
    assert type(error) is kind
    assert error.code == code
    assert error.type in ("invalid_request_error", "authentication_error")
    assert error.request_id


async def test_a_workers_failure_is_a_server_error_and_in_a_stream_an_api_error(served: Served) -> None:
    served.worker.lose_after_tokens = 0
    error = await asyncio.to_thread(failing, served, {})
    assert isinstance(error, openai.InternalServerError)
    assert error.code == "worker_lost"
    await served.node.sees(served.worker.url)
    served.worker.lose_after_tokens = 2
    stream = await served.client.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(openai.APIError, match="went away") as caught:
        assert not [event async for event in stream]
    assert not isinstance(caught.value, openai.APIStatusError)
    await served.node.sees(served.worker.url)


async def test_a_refusal_by_load_is_asked_again_when_it_says(served: Served) -> None:
    served.worker.token_delay_s = 0.02
    busy = [asyncio.ensure_future(served.client.chat.completions.create(**CHAT | {"max_tokens": 30})) for _ in range(2)]
    await eventually_async(lambda: len(served.worker.requests) == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        await served.client.chat.completions.create(**CHAT)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    answer = await served.client.with_options(max_retries=2).chat.completions.create(**CHAT)
    assert answer.choices[0].message.content
    await asyncio.gather(*busy)


async def test_a_time_out_of_the_client_cancels_in_the_worker(served: Served) -> None:
    served.worker.token_delay_s = 0.05
    with pytest.raises(openai.APITimeoutError):
        await served.client.with_options(timeout=0.3).chat.completions.create(**CHAT | {"max_tokens": 2000})
    await eventually_async(lambda: served.worker.cancelled == 1, what="cancelled in the worker")


async def test_leaving_a_stream_cancels_in_the_worker(served: Served) -> None:
    served.worker.token_delay_s = 0.01

    def leave() -> None:
        with (
            served.sync() as client,
            client.chat.completions.create(**CHAT | {"max_tokens": 2000}, stream=True) as told,
        ):
            next(iter(told))

    await asyncio.to_thread(leave)
    await eventually_async(lambda: served.worker.cancelled == 1, what="cancelled in the worker")
    await eventually_async(lambda: served.node.node.inference.in_flight == 0)


async def test_answers_are_parsed_into_classes(served: Served) -> None:
    served.answers('{"name": "Oslo"}')
    parsed = await served.client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=City)
    assert parsed.choices[0].message.parsed == City(name="Oslo")
    assert served.worker.requests[-1]["structured_outputs"]["json"]["required"] == ["name"]
    async with served.client.chat.completions.stream(model=MODEL, messages=HELLO, response_format=City) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == City(name="Oslo")
    plain = await served.client.chat.completions.create(
        **CHAT | {"max_tokens": 20}, response_format={"type": "json_object"}
    )
    assert json.loads(plain.choices[0].message.content or "") == {"name": "Oslo"}


def whole(client: openai.OpenAI, **how: Any) -> Any:
    return client.chat.completions.create(**CHAT | {"max_tokens": 200}, **how).choices[0]


def streamed(client: openai.OpenAI, **how: Any) -> Any:
    with client.chat.completions.stream(**CHAT | {"max_tokens": 200}, **how) as stream:
        return stream.get_final_completion().choices[0]


CHOICES: list[tuple[Any, str, str]] = [
    ("auto", '<tool_call>{"name": "City", "arguments": {"name": "Oslo"}}</tool_call>', "tool_calls"),
    ("required", '[{"name": "City", "arguments": {"name": "Oslo"}}]', "tool_calls"),
    ({"type": "function", "function": {"name": "City"}}, '{"name": "Oslo"}', "stop"),
    ("none", '{"name": "Oslo"}', "stop"),
]


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize(("choice", "says", "reason"), CHOICES)
async def test_every_choice_of_tools_comes_back_as_the_package_has_it(
    served: Served, ask: Callable[..., Any], choice: Any, says: str, reason: str
) -> None:
    served.answers(says)
    tool = openai.pydantic_function_tool(City)

    def asked() -> Any:
        with served.sync() as client:
            return ask(client, tools=[tool], tool_choice=choice)

    answer = await asyncio.to_thread(asked)
    assert answer.finish_reason == reason
    if choice == "none":
        assert answer.message.content == says
        return
    [call] = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("City", {"name": "Oslo"})
    back = [*HELLO, {"role": "assistant", "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})]}]
    back.append({"role": "tool", "tool_call_id": call.id, "content": "Rain."})
    await served.client.chat.completions.create(**CHAT | {"messages": back}, tools=[tool])


async def test_what_the_sync_client_streams_is_what_it_gets_whole(served: Served) -> None:
    how = CHAT | {"n": 2, "seed": 5, "logprobs": True, "top_logprobs": 1, "stop": ["never"], "user": "u"}
    how |= {"max_completion_tokens": 6, "extra_body": {"cache_salt": "s", "top_k": 5, "min_p": 0.1}}

    def both() -> tuple[Any, list[Any]]:
        with served.sync() as client:
            events = client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
            return client.chat.completions.create(**how), list(events)

    answer, events = await asyncio.to_thread(both)
    for index in range(2):
        own = [choice for event in events for choice in event.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in own) == answer.choices[index].message.content
        scores = [entry for choice in own if choice.logprobs for entry in choice.logprobs.content]
        assert scores == answer.choices[index].logprobs.content
        assert len(scores) == 6
    assert [event.usage.completion_tokens for event in events if event.usage] == [answer.usage.completion_tokens]
    assert [event.usage for event in events[:-1]] == [None] * (len(events) - 1)
    assert {request["cache_salt"] for request in served.worker.requests} == {"s"}
    assert {request["max_tokens"] for request in served.worker.requests} == {6}


async def test_endpoints_without_a_name_in_the_package_are_reached_by_it(served: Served) -> None:
    def reach() -> tuple[Any, Any]:
        with served.sync(base_url=served.node.url) as client:
            told = client.post("/tokenize", body={"prompt": "Once"}, cast_to=dict[str, Any])
            back = client.post("/detokenize", body={"tokens": told["tokens"]}, cast_to=dict[str, Any])
            return back["prompt"], client.get("/version", cast_to=dict[str, Any])["version"]

    text, version = await asyncio.to_thread(reach)
    assert text == "Once"
    assert version
