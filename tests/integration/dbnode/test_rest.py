"""The OpenAI-compatible face, spoken to by OpenAI's own client, over stand-in workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from stratakv.keys import block_keys, pack_keys
from stratakv.settings import Bytes, RestSettings, Secret
from stratakv.text import decode, encode
from stratakv.wire import Pinned, PinPrefix
from tests.integration.dbnode.running_node import PoolOfBlocks, RunningNode, running_node
from tests.integration.pool.command import stratakv
from tests.stand_in_worker import MODEL, StandInWorker, expected_tokens
from tests.support import eventually_async

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


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


async def test_a_chat_answer_is_the_workers_tokens_as_text(node: RunningNode, worker: StandInWorker) -> None:
    answer = await node.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12)
    prompt = worker.requests[0]["prompt"]
    assert answer.choices[0].message.content == text_of(node, expected_tokens(prompt, 12))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert worker.requests[0]["temperature"] == 1.0


async def test_a_streamed_chat_has_the_same_text_and_usage_at_the_end(node: RunningNode, worker: StandInWorker) -> None:
    whole = await node.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20)
    stream = await node.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    num_prompt = len(worker.requests[0]["prompt"])
    assert usage.prompt_tokens_details.cached_tokens == num_prompt // 16 * 16
    tiers = usage.model_dump()["stratakv"]
    assert tiers["computed"] + tiers["l1"] + tiers["l2"] + tiers["pool"] == num_prompt
    assert tiers["e2e_ms"] >= tiers["ttft_ms"] > 0


async def test_completions_take_text_and_token_ids(node: RunningNode, worker: StandInWorker) -> None:
    ids = encode(node.node.inference.tokens.tokenizer, "Once upon a time")
    by_text = await node.openai.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=5)
    by_ids = await node.openai.completions.create(model=MODEL, prompt=ids, max_tokens=5)
    assert by_text.choices[0].text == by_ids.choices[0].text == text_of(node, expected_tokens(ids, 5))


async def test_text_ends_before_a_stop_string_and_the_worker_is_told_to_stop(
    node: RunningNode, worker: StandInWorker
) -> None:
    worker.token_delay_s = 0.005
    ids = encode(node.node.inference.tokens.tokenizer, "Stop here")
    whole = text_of(node, expected_tokens(ids, 30))
    stop = whole[20:24]
    stream = await node.openai.completions.create(model=MODEL, prompt=ids, max_tokens=3000, stop=stop, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    await eventually_async(lambda: worker.cancelled == 1, what="cancelled in the worker")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_cancels_in_the_worker(node: RunningNode, worker: StandInWorker, stream: bool) -> None:
    worker.token_delay_s = 0.01
    body = {"messages": HELLO, "max_tokens": 3000, "stream": stream}
    response = await node.http.post("/v1/chat/completions", json=body) if stream else None
    if response is not None:
        await response.content.readany()
        response.close()
    else:
        with pytest.raises(TimeoutError):
            await node.http.post("/v1/chat/completions", json=body, timeout=aiohttp.ClientTimeout(0.5))
    await eventually_async(lambda: worker.cancelled == 1, what="cancelled in the worker")
    await eventually_async(lambda: node.node.inference.in_flight == 0)
    assert node.node.inference.admission.running == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("n", 129),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "x"),
        ("top_logprobs", 2),
        ("logprobs", 3),
        ("temperature", "hot"),
        ("temperature", 2.5),
        ("top_p", True),
        ("max_tokens", 0),
        ("stop", [""]),
        ("stop", "x" * 5000),
        ("seed", 1.5),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("messages", []),
        ("made_up", 1),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(node: RunningNode, field: str, value: Any) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 3} | {field: value}
    async with node.http.post("/v1/chat/completions", json=body) as response:
        error = (await response.json())["error"]
    assert response.status == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert field in error["message"]


async def test_values_that_ask_for_nothing_are_accepted(node: RunningNode) -> None:
    await node.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=2, n=1, presence_penalty=0, logprobs=False, user="u", tools=[]
    )


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"messages":"\\ud800"}'])
async def test_a_malformed_body_is_an_openai_error(node: RunningNode, body: bytes) -> None:
    async with node.http.post("/v1/chat/completions", data=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_context_overflow_names_the_numbers(node: RunningNode) -> None:
    with pytest.raises(openai.BadRequestError, match=r"5000 .*4096") as caught:
        await node.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"


async def test_an_unknown_model_is_not_found(node: RunningNode) -> None:
    with pytest.raises(openai.NotFoundError):
        await node.openai.chat.completions.create(model="other", messages=HELLO)


async def test_models_health_version_and_routes(node: RunningNode) -> None:
    assert [m.id async for m in node.openai.models.list()] == [MODEL]
    assert (await node.openai.models.retrieve(MODEL)).id == MODEL
    await node.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
    for path in ("/health", "/ready", "/version", "/admin/routes", "/admin/workers"):
        async with node.http.get(path) as response:
            assert response.status == 200, path
    async with node.http.get("/admin/routes") as response:
        assert (await response.json())["routes"][0]["worker"] == "w0"
    async with node.http.get("/metrics") as response:
        text = await response.text()
    assert 'stratakv_time_to_first_token_seconds_count{model_name="smollm2-135m"} 1.0' in text
    assert 'stratakv_requests_total{error="",model_name="smollm2-135m",outcome="completed",source="rest"} 1.0' in text


async def test_unknown_paths_and_methods_have_openai_errors(node: RunningNode) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        async with node.http.request(method, path) as response:
            assert response.status == status
            assert "message" in (await response.json())["error"]


async def test_the_request_id_comes_back(node: RunningNode) -> None:
    async with node.http.get("/health", headers={"X-Request-Id": "mine-1"}) as response:
        assert response.headers["X-Request-Id"] == "mine-1"
    async with node.http.get("/health", headers={"X-Request-Id": "a b"}) as response:
        assert response.headers["X-Request-Id"] != "a b"


async def test_dropping_the_cache_reaches_all_workers(node: RunningNode, worker: StandInWorker) -> None:
    await node.openai.completions.create(model=MODEL, prompt=list(range(100, 164)), max_tokens=2)
    async with node.http.post("/admin/cache/drop", json={"tiers": ["l1", "l2"]}) as response:
        assert (await response.json())["workers"]["w0"]["l1_blocks"] == 4
    assert not worker.l1


async def test_the_api_key_guards_all_but_health(worker: StandInWorker) -> None:
    async with running_node(worker, rest=RestSettings(api_key=Secret("k1"))) as node:
        await node.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
        for path in ("/v1/models", "/metrics", "/ready", "/docs", "/openapi.json"):
            async with node.http.get(path) as response:
                assert response.status == 401, path
                assert (await response.json())["error"]["code"] == "invalid_api_key"
        async with node.http.get("/health") as response:
            assert response.status == 200


async def test_a_body_over_the_limit_is_413(worker: StandInWorker) -> None:
    async with (
        running_node(worker, rest=RestSettings(body_bytes_max=Bytes(1000))) as node,
        node.http.post("/v1/chat/completions", data=b" " * 1001) as response,
    ):
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "body_too_large"


async def test_without_a_worker_it_is_not_ready_and_says_so() -> None:
    async with running_node() as node:
        async with node.http.get("/ready") as response:
            assert response.status == 503
        with pytest.raises(openai.InternalServerError) as caught:
            await node.openai.chat.completions.create(model=MODEL, messages=HELLO)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["Retry-After"] == "1"


class PoolWithPins(PoolOfBlocks):
    """A pool that has the first two blocks of everything."""

    def __init__(self) -> None:
        super().__init__(2)
        self.pinned: list[PinPrefix] = []

    async def call(self, request: Any, reply_type: type[Any], timeout_s: float | None = None) -> Any:
        if isinstance(request, PinPrefix):
            self.pinned.append(request)
            return Pinned(2, 2**62 + 1)
        return await super().call(request, reply_type, timeout_s)


async def test_a_prompt_is_pinned_by_the_keys_its_request_would_have(worker: StandInWorker) -> None:
    pool = PoolWithPins()
    messages = [{"role": "user", "content": "word " * 60}]
    async with running_node(worker, meta=pool) as node:
        await node.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)  # type: ignore[arg-type]
        keys = pack_keys(block_keys(worker.requests[0]["prompt"], 16))
        async with node.http.post("/v1/stratakv/pin", json={"messages": messages, "seconds": 60}) as response:
            answer = await response.json()
    (request,) = pool.pinned
    assert (request.keys, request.pin_s) == (keys, 60.0)
    assert answer["blocks"] == 2
    assert [pin["id"] for pin in answer["pins"]] == [str(2**62 + 1)]


@pytest.mark.parametrize(
    "body", [{"prompt": "x"}, {"seconds": 5}, {"prompt": "x", "seconds": 1e9}, {"prompt": "x", "seconds": 5, "n": 2}]
)
async def test_a_pin_without_prompt_or_time_is_refused(node: RunningNode, body: dict[str, Any]) -> None:
    async with node.http.post("/v1/stratakv/pin", json=body) as response:
        assert response.status == 400


async def test_the_command_line_pins_a_prompt_file(worker: StandInWorker, tmp_path: Path) -> None:
    pool = PoolWithPins()
    prompt = tmp_path / "prompt"
    prompt.write_text("word " * 60)
    async with running_node(worker, meta=pool, rest=RestSettings(api_key=Secret("key"))) as node:
        port = f"--set=rest.port={node.url.rpartition(':')[2]}"
        pin = ("cache", "pin", port, "--set=rest.api_key=key", "--for", "2h")
        done = await stratakv(1, tmp_path, *pin, "--prompt-file", str(prompt), "--system", "Be brief.")
        assert done.status == 0, done.err
        assert (await stratakv(1, tmp_path, *pin)).status == 1
    assert "2 blocks kept for 2h" in done.out
    assert pool.pinned[0].pin_s == 7200.0
