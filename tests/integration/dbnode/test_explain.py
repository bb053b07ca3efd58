"""What a statement's prompts would cost: the model's own tokens, what workers and the pool hold, and no request to a worker."""

from __future__ import annotations

import pytest

from dbnode.generate import Caller
from dbnode.sql.service import InferCall
from dbnode.sql_explain import SqlExplainer
from dbnode.sql_inference import SqlInference, request_of
from stratakv.errors import InvalidRequest
from tests.integration.dbnode.running_node import PoolOfBlocks, running_node
from tests.stand_in_worker import BLOCK_SIZE, StandInWorker

LONG = "The same long beginning of every prompt, which says at length what is to be done with the text. " * 20


def call(prompt: str, **options: object) -> InferCall:
    return InferCall(prompt, None, {"max_tokens": 4, **options}, "ada", "d", "s")


async def test_tokens_and_shared_beginnings_are_those_of_the_prompts_that_would_be_sent() -> None:
    worker = await StandInWorker("w").start()
    async with running_node(worker) as running:
        calls = [call(f"{LONG} {word}") for word in ("one", "two", "three")] + [call("Hi", system="Be brief.")]
        estimate = await SqlExplainer(running.node.inference, running.node.tenants).estimate(calls)
        keys = await running.node.inference.prompt_keys([request_of(c, Caller()) for c in calls])
        lengths = sorted(len(k.token_ids) for k in keys)
        assert worker.requests == []
        assert estimate.prompt_tokens == sum(lengths)
        assert (estimate.prompt_tokens_median, estimate.prompt_tokens_max) == (lengths[1], lengths[3])
        assert estimate.cached_tokens == 0
        in_common = len(keys[0].token_ids) // BLOCK_SIZE - 1
        assert estimate.shared_tokens in range(2 * (in_common - 1) * BLOCK_SIZE, 2 * (in_common + 1) * BLOCK_SIZE + 1)
        computed = estimate.prompt_tokens - estimate.shared_tokens
        assert estimate.estimated_s == pytest.approx(computed / 1000 + 4 * 4 / 4 * 0.01, rel=0.01)

        await SqlInference(running.node.inference, running.node.tenants).infer_text(calls[0])
        warm = await SqlExplainer(running.node.inference, running.node.tenants).estimate(calls)
        assert warm.cached_tokens > estimate.shared_tokens
        assert warm.cached_tokens + warm.shared_tokens > estimate.shared_tokens
        assert warm.estimated_s is not None
        assert warm.estimated_s < estimate.estimated_s
        prompt = [r["prompt"] for r in worker.requests]
        assert prompt == [list(keys[0].token_ids)]
    await worker.stop()


async def test_the_pool_counts_too() -> None:
    worker = await StandInWorker("w").start()
    async with running_node(worker, meta=PoolOfBlocks(5)) as running:
        estimate = await SqlExplainer(running.node.inference, running.node.tenants).estimate([call(LONG)])
        assert estimate.cached_tokens == 5 * BLOCK_SIZE
    await worker.stop()


async def test_without_workers_the_time_is_unknown_and_without_prompts_nothing_is() -> None:
    async with running_node() as running:
        estimate = await SqlExplainer(running.node.inference, running.node.tenants).estimate([call("Hi")])
        assert estimate.estimated_s is None
        assert estimate.prompt_tokens > 0
        nothing = await SqlExplainer(running.node.inference, running.node.tenants).estimate([])
        assert (nothing.prompt_tokens, nothing.prompt_tokens_max) == (0, 0)


async def test_wrong_options_are_refused_as_infer_would() -> None:
    async with running_node() as running:
        with pytest.raises(InvalidRequest, match="made_up"):
            await SqlExplainer(running.node.inference, running.node.tenants).estimate([call("Hi", made_up=1)])
