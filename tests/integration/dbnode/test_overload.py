"""Load that makes a request too late refuses it before it costs anything, and says when to come again."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from dbnode.errors import ExpectedTooLate
from dbnode.sql.service import InferCall, NullAnswer
from dbnode.sql_inference import SqlInference
from stratakv.keys import block_keys, unpack_keys
from stratakv.wire import Done, FetchAhead
from tests.integration.dbnode.running_node import PoolOfBlocks, RunningNode, running_node
from tests.stand_in_worker import BLOCK_SIZE, MODEL, StandInWorker
from tests.support import eventually_async

PROMPT = list(range(300, 350))
BUSY = {"prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01, "waiting_tokens": 9000, "waiting": 3}


class AskedPool(PoolOfBlocks):
    """Remembers what it was told to fetch."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.fetched: list[FetchAhead] = []

    async def call(self, request: Any, reply_type: type[Any], timeout_s: float | None = None) -> Any:
        if isinstance(request, FetchAhead):
            self.fetched.append(request)
            return Done()
        return await super().call(request, reply_type, timeout_s)


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[StandInWorker]:
    worker = StandInWorker("w", load=dict(BUSY))
    await worker.start()
    yield worker
    await worker.stop()


@pytest_asyncio.fixture
async def node(worker: StandInWorker) -> AsyncIterator[RunningNode]:
    async with running_node(worker, interactive_ttft_s=2.0) as node:
        yield node


async def complete(node: RunningNode, **extra: Any) -> str:
    answer = await node.openai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, extra_body=extra)
    return answer.choices[0].text


def call(**options: Any) -> InferCall:
    return InferCall("Hello", None, options, "role", "database", "session")


async def test_a_request_that_would_miss_its_class_is_refused_with_a_time_to_come_again(
    node: RunningNode, worker: StandInWorker
) -> None:
    with pytest.raises(openai.RateLimitError, match=r"expected in 9\.\d s and wanted in [12]\.\d s") as caught:
        await complete(node)
    assert caught.value.code == "expected_too_late"
    assert 7 <= int(caught.value.response.headers["Retry-After"]) <= 8
    assert not worker.requests


async def test_another_class_waits(node: RunningNode) -> None:
    assert await complete(node, slo_class="batch")


async def test_an_idle_fleet_refuses_nobody(node: RunningNode, worker: StandInWorker) -> None:
    worker.load["waiting_tokens"] = 0
    (record,) = node.node.directory.records
    await eventually_async(lambda: not record.load.waiting_tokens, what="the node hears that it is idle")
    assert await complete(node)


async def test_what_a_request_that_waits_will_need_is_fetched_ahead(worker: StandInWorker) -> None:
    pool = AskedPool(num_blocks=2)
    async with running_node(worker, meta=pool) as node:
        await node.openai.completions.create(model=MODEL, prompt=list(range(400, 600)), max_tokens=3)
        await eventually_async(lambda: pool.fetched, what="the pool is asked to fetch ahead")
    (asked,) = pool.fetched
    assert unpack_keys(asked.keys) == block_keys(list(range(400, 600)), BLOCK_SIZE)


async def test_a_row_that_cannot_come_in_time_says_so_at_once_or_is_null(node: RunningNode) -> None:
    sql = SqlInference(node.node.inference, node.node.tenants)
    with pytest.raises(ExpectedTooLate) as caught:
        await sql.infer_text(call(timeout_ms=3000))
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("Try again in about ")
    with pytest.raises(NullAnswer):
        await sql.infer_text(call(timeout_ms=3000, on_error="null"))
    with pytest.raises(ExpectedTooLate):
        await sql.infer_text(call(slo_class="interactive"))


@pytest.mark.parametrize(("max_running", "given"), [(0, 3), (1, 2), (2, 4)])
async def test_a_worker_is_given_twice_what_it_runs_at_once_and_the_rest_wait(max_running: int, given: int) -> None:
    worker = await StandInWorker("w", max_running=max_running, hang=True).start()
    async with running_node(worker, worker_requests_max=3) as node:
        asked = [asyncio.create_task(complete(node)) for _ in range(6)]
        admission = node.node.inference.admission
        await eventually_async(lambda: (admission.running, admission.waiting) == (given, 6 - given))
        await eventually_async(lambda: len(worker.requests) == given)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await eventually_async(lambda: (admission.running, admission.waiting) == (0, 0))
    await worker.stop()


async def test_decisions_are_shown_with_scores_and_reasons(node: RunningNode) -> None:
    await complete(node, slo_class="batch")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "stratakv.cli", "status", "--routes"),
        *("--set", f"rest.port={node.url.rpartition(':')[2]}"),
        stdout=asyncio.subprocess.PIPE,
    )
    shown = (await process.communicate())[0].decode()
    assert process.returncode == 0
    assert "ms waiting + " in shown
    assert "cost: " in shown
