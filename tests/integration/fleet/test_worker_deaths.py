"""kill -9 of workers behind a DB node: before the first token and after it, the client gets the tokens of one that never died."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dbnode.generate import GenerateRequest, Sampling, Source
from stratakv.pool.meta_client import MetaClient
from stratakv.settings import MetaSettings
from stratakv.wire import ListWorkers, Workers
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.integration.fleet.conftest import Pool
from tests.integration.fleet.processes import Worker
from tests.integration.fleet.test_reuse import prompt_of
from tests.support import eventually, eventually_async

OUTPUT_TOKENS = 40


class PoolOnly:
    """The fleet's meta server, which is not asked for workers: the test names them."""

    def __init__(self, client: MetaClient) -> None:
        self._client = client

    @property
    def available(self) -> bool:
        return self._client.available

    async def call(self, request: Any, reply_type: type[Any], timeout_s: float | None = None) -> Any:
        if isinstance(request, ListWorkers):
            return Workers([])
        return await self._client.call(request, reply_type, timeout_s=timeout_s)


def _request(prompt: list[int]) -> GenerateRequest:
    return GenerateRequest(
        request_id=uuid.uuid4().hex,
        source=Source.REST,
        arrived_s=time.monotonic(),
        prompt=tuple(prompt),
        sampling=Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True),
    )


async def answer(
    node: RunningNode, prompt: list[int], on_token: Callable[[int], None] = lambda number: None
) -> list[int]:
    """All tokens; `on_token` is told how many have come."""
    got: list[int] = []
    async for chunk in node.node.inference.generate(_request(prompt)):
        got += chunk.token_ids
        on_token(len(got))
    return got


async def test_a_client_does_not_notice_that_workers_are_killed(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = (prompt_of(tokenizer, 900, seed=seed) for seed in (4000, 4001))
    expected = [pool.alone.complete(prompt, OUTPUT_TOKENS).token_ids for prompt in (before, after)]
    pool.alone.drop("l1")
    by_name = {"prefill": pool.prefill, "decode": pool.decode, "alone": pool.alone}
    try:
        async with MetaClient(replace(MetaSettings(), native_port=pool.fleet.meta_port)) as meta:
            await eventually_async(lambda: meta.available, what="the meta server to answer")
            async with running_node(also=tuple(w.url for w in by_name.values()), meta=PoolOnly(meta)) as node:
                decisions = node.node.inference.scheduler.decisions
                answering = asyncio.create_task(answer(node, before))
                await eventually_async(lambda: bool(decisions), what="the request is routed")
                victim = by_name[decisions[0].prefill or decisions[0].worker]
                await eventually_async(lambda: is_computing(victim), what="the prompt is being computed")
                victim.process.kill()
                assert await answering == expected[0]

                def kill_at_fifth(number: int) -> None:
                    if number == 5:
                        by_name[decisions[-1].worker].process.kill()

                assert await answer(node, after, kill_at_fifth) == expected[1]
                assert [decision.attempt for decision in decisions] == [0, 1, 0, 1]
                assert sum(worker.process.has_ended() for worker in by_name.values()) == 2
    finally:
        for worker in by_name.values():
            if worker.process.has_ended():
                worker.process.start()
        for worker in by_name.values():
            eventually(worker.is_ready, timeout_s=90, what=f"{worker.url} ready again")


def is_computing(worker: Worker) -> bool:
    return bool(worker.get("/load").get("waiting_tokens"))
