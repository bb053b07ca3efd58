"""Workers that die, refuse or hang: a request ends well on another one, or with a typed error."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest
import pytest_asyncio

from dbnode.errors import WorkersExhausted
from dbnode.generate import GenerateRequest, Sampling, Source
from tests.integration.dbnode.running_node import PoolOfBlocks, RunningNode, running_node
from tests.stand_in_worker import MAX_MODEL_LEN, MODEL, StandInWorker, expected_tokens
from tests.support import eventually_async, free_port

PROMPT = list(range(1000, 1100))
LONG = list(range(1000, 1800))
POISON = 666


@pytest_asyncio.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def started(
    stack: AsyncExitStack, *workers: StandInWorker, also: tuple[str, ...] = (), **node: Any
) -> RunningNode:
    """A node over these workers, and over others that run already."""
    for worker in workers:
        await worker.start()
        stack.push_async_callback(worker.stop)
    return await stack.enter_async_context(running_node(*workers, also=also, **node))


async def answer(node: RunningNode, num_tokens: int, prompt: list[int] = PROMPT) -> list[int]:
    """Token ids of a streamed answer, read through the inference service's own chunks."""
    request = _request(prompt, num_tokens)
    return [token async for chunk in node.node.inference.generate(request) for token in chunk.token_ids]


def _request(prompt: list[int], num_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=uuid.uuid4().hex,
        source=Source.REST,
        arrived_s=time.monotonic(),
        prompt=tuple(prompt),
        sampling=Sampling(max_tokens=num_tokens),
    )


@pytest.mark.parametrize("lost_after", [0, 7])
async def test_a_request_goes_on_elsewhere_when_its_worker_is_lost(stack: AsyncExitStack, lost_after: int) -> None:
    bad, good = StandInWorker("bad", lose_after_tokens=lost_after), StandInWorker("good", load={"waiting_tokens": 9000})
    node = await started(stack, bad, good)
    assert await answer(node, 20) == expected_tokens(PROMPT, 20)
    assert len(bad.requests) == 1
    resumed = (good.requests[0].get("kv_transfer_params") or {}).get("output_token_ids", [])
    assert resumed == expected_tokens(PROMPT, lost_after)


async def test_a_killed_worker_is_not_noticed_by_the_client(stack: AsyncExitStack) -> None:
    process, url = await _started_process(stack, token_delay_s=0.01)
    other = StandInWorker("other", load={"waiting_tokens": 9000})
    node = await started(stack, other, also=(url,))
    got: list[int] = []
    async for chunk in node.node.inference.generate(_request(PROMPT, 60)):
        got += chunk.token_ids
        if len(got) == 5:
            os.kill(process.pid, signal.SIGKILL)
    assert got == expected_tokens(PROMPT, 60)
    assert len(other.requests) == 1


async def test_a_frozen_worker_loses_what_it_has_in_hand(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbnode.scheduler.workers.PROBE_TIMEOUT_S", 0.2)
    monkeypatch.setattr("dbnode.scheduler.workers.SILENT_S_MAX", 0.5)
    process, url = await _started_process(stack, token_delay_s=0.01)
    other = StandInWorker("other", load={"waiting_tokens": 9000})
    node = await started(stack, other, also=(url,))
    got: list[int] = []
    async for chunk in node.node.inference.generate(_request(PROMPT, 60)):
        got += chunk.token_ids
        if len(got) == 5:
            os.kill(process.pid, signal.SIGSTOP)
    assert got == expected_tokens(PROMPT, 60)


async def test_a_request_sent_to_a_frozen_worker_goes_elsewhere(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbnode.scheduler.workers.PROBE_TIMEOUT_S", 0.3)
    monkeypatch.setattr("dbnode.scheduler.workers.SILENT_S_MAX", 0.8)
    process, url = await _started_process(stack, token_delay_s=0.0)
    other = StandInWorker("other", load={"waiting_tokens": 9000})
    node = await started(stack, other, also=(url,))
    os.kill(process.pid, signal.SIGSTOP)
    assert await answer(node, 5) == expected_tokens(PROMPT, 5)
    assert node.node.inference.scheduler.decisions[0].worker == "process"


async def _started_process(
    stack: AsyncExitStack, token_delay_s: float, name: str = "process"
) -> tuple[asyncio.subprocess.Process, str]:
    """A stand-in worker in a process of its own, to be killed."""
    port = free_port()
    command = [sys.executable, "-m", "tests.stand_in_worker", str(port), name, "both", str(token_delay_s), str(POISON)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    stack.push_async_callback(_ended, process)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process, f"http://127.0.0.1:{port}"


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_a_prompt_that_kills_two_workers_is_failed(stack: AsyncExitStack) -> None:
    workers = [StandInWorker(f"w{i}", lose_after_tokens=0) for i in range(4)]
    node = await started(stack, *workers)
    with pytest.raises(openai.InternalServerError, match="2 workers were lost"):
        await node.openai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5)
    assert sum(len(w.requests) for w in workers) == 2


async def test_a_prompt_that_kills_is_found_among_others_and_refused_from_then_on(stack: AsyncExitStack) -> None:
    workers = [await _started_process(stack, token_delay_s=0.02, name=f"w{i}") for i in range(3)]
    node = await started(stack, also=tuple(url for _, url in workers))
    prompts = [[7 + number, *PROMPT] for number in range(9)]
    poison = [POISON, *PROMPT]
    others = [asyncio.create_task(answer(node, 60, prompt)) for prompt in prompts]
    with pytest.raises(WorkersExhausted, match="2 workers were lost"):
        await answer(node, 60, poison)
    assert await asyncio.gather(*others) == [expected_tokens(prompt, 60) for prompt in prompts]
    with pytest.raises(openai.UnprocessableEntityError, match="workers died of this prompt") as refused:
        await node.openai.completions.create(model=MODEL, prompt=poison, max_tokens=60)
    assert refused.value.code == "poison_prompt"
    assert sorted(process.returncode or 0 for process, _ in workers) == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert await answer(node, 5, prompts[0]) == expected_tokens(prompts[0], 5)


async def test_the_clients_own_mistake_is_not_tried_elsewhere(stack: AsyncExitStack) -> None:
    workers = [StandInWorker(f"w{i}", refuse_status=400) for i in range(2)]
    node = await started(stack, *workers)
    with pytest.raises(openai.BadRequestError):
        await node.openai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5)
    assert sum(len(w.requests) for w in workers) == 1


async def test_a_full_worker_is_passed_over_and_all_full_is_429(stack: AsyncExitStack) -> None:
    full, free = StandInWorker("full", refuse_status=429), StandInWorker("free", load={"waiting_tokens": 9000})
    node = await started(stack, full, free)
    assert await answer(node, 5) == expected_tokens(PROMPT, 5)
    free.refuse_status = 429
    with pytest.raises(openai.RateLimitError) as caught:
        await node.openai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5)
    assert caught.value.response.headers["Retry-After"] == "1"


async def test_a_long_prompt_is_split_between_prefill_and_decode(stack: AsyncExitStack) -> None:
    prefill, decode = StandInWorker("p", "prefill"), StandInWorker("d", "decode")
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    answered = await node.openai.completions.create(model=MODEL, prompt=LONG, max_tokens=10)
    assert answered.usage is not None
    assert answered.usage.model_dump()["stratakv"]["computed"] == len(LONG)
    assert prefill.requests[0]["max_tokens"] == 1
    assert prefill.requests[0]["kv_transfer_params"]["do_remote_decode"] is True
    sent = decode.requests[0]["kv_transfer_params"]
    assert sent["do_remote_prefill"] is True
    assert sent["output_token_ids"] == expected_tokens(LONG, 1)
    assert decode.requests[0]["max_tokens"] == 10
    assert await answer(node, 10, LONG[::-1]) == expected_tokens(LONG[::-1], 10)


async def test_a_short_prompt_stays_on_the_decode_worker(stack: AsyncExitStack) -> None:
    prefill, decode = StandInWorker("p", "prefill"), StandInWorker("d", "decode")
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    await answer(node, 5)
    assert (len(prefill.requests), len(decode.requests)) == (0, 1)


async def test_a_prompt_that_is_in_the_pool_is_not_split(stack: AsyncExitStack) -> None:
    prefill, decode = StandInWorker("p", "prefill"), StandInWorker("d", "decode")
    node = await started(stack, prefill, decode, meta=PoolOfBlocks(num_blocks=len(LONG) // 16))
    await answer(node, 5, LONG)
    assert (len(prefill.requests), len(decode.requests)) == (0, 1)


async def test_when_the_prefill_worker_is_lost_another_does_the_whole_job(stack: AsyncExitStack) -> None:
    prefill, decode = StandInWorker("p", "prefill", lose_prefills=True), StandInWorker("d", "decode")
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    assert await answer(node, 10, LONG) == expected_tokens(LONG, 10)
    assert "kv_transfer_params" not in decode.requests[0]


async def test_when_the_decode_worker_is_lost_the_rest_is_continued_elsewhere(stack: AsyncExitStack) -> None:
    prefill, decode = StandInWorker("p", "prefill"), StandInWorker("d", "decode", lose_after_tokens=0)
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    assert await answer(node, 10, LONG) == expected_tokens(LONG, 10)
    assert prefill.requests[1]["kv_transfer_params"] == {"output_token_ids": expected_tokens(LONG, 1)}


async def test_what_did_not_get_into_the_pool_is_decoded_where_it_was_computed(stack: AsyncExitStack) -> None:
    prefill, decode = StandInWorker("p", "prefill", pool_writes_fail=True), StandInWorker("d", "decode")
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    assert await answer(node, 10, LONG) == expected_tokens(LONG, 10)
    assert (len(prefill.requests), len(decode.requests)) == (2, 0)


async def test_a_worker_that_hangs_costs_no_more_than_the_deadline(stack: AsyncExitStack) -> None:
    node = await started(stack, StandInWorker("w", hang=True), request_timeout_s=0.5)
    with pytest.raises(openai.InternalServerError) as caught:
        await node.openai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5)
    assert caught.value.status_code == 504


async def test_a_chat_that_names_no_limit_is_bounded_by_the_context_and_ends_at_the_deadline(
    stack: AsyncExitStack,
) -> None:
    worker = StandInWorker("w", token_delay_s=0.05)
    node = await started(stack, worker, request_timeout_s=0.5)
    with pytest.raises(openai.InternalServerError) as caught:
        await node.openai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Go on."}])
    assert caught.value.status_code == 504
    (sent,) = worker.requests
    assert sent["max_tokens"] == MAX_MODEL_LEN - len(sent["prompt"])
    await eventually_async(lambda: worker.cancelled == 1, what="the worker's work is stopped")
    assert node.node.inference.admission.running == 0


async def test_siblings_follow_the_first_to_the_same_worker(stack: AsyncExitStack) -> None:
    workers = [StandInWorker(f"w{i}") for i in range(3)]
    node = await started(stack, *workers)
    for last in range(6):
        await answer(node, 2, [*LONG, 2000 + last])
    assert sorted(len(w.requests) for w in workers) == [0, 0, 6]


async def test_a_worker_that_starts_anew_is_believed_empty(stack: AsyncExitStack) -> None:
    worker = StandInWorker("w")
    node = await started(stack, worker)
    await answer(node, 2, LONG)
    record = node.node.directory.records[0]
    assert len(record.index) == len(LONG) // 16
    worker.epoch = os.urandom(16)
    await eventually_async(lambda: len(record.index) == 0)


async def test_a_draining_worker_gets_nothing_new(stack: AsyncExitStack) -> None:
    draining, other = StandInWorker("a"), StandInWorker("b", load={"waiting_tokens": 100_000})
    node = await started(stack, draining, other)
    draining.load = {"draining": True}
    await node.sees(other.url)
    await answer(node, 2)
    assert (len(draining.requests), len(other.requests)) == (0, 1)


async def test_a_worker_that_warms_up_gets_nothing_before_it_is_ready(stack: AsyncExitStack) -> None:
    cold, warm = StandInWorker("a", warming_up=True), StandInWorker("b", load={"waiting_tokens": 100_000})
    await cold.start()
    stack.push_async_callback(cold.stop)
    await warm.start()
    stack.push_async_callback(warm.stop)
    node = await stack.enter_async_context(running_node(warm, workers=(cold.url, warm.url)))
    await answer(node, 2)
    cold.warming_up = False
    await node.sees(cold.url, warm.url)
    await answer(node, 2)
    assert (len(cold.requests), len(warm.requests)) == (1, 1)
