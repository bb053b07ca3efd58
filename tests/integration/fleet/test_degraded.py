"""Promises P1 and P7 on real processes: what is damaged or gone is recomputed, and caching comes back by itself."""

from __future__ import annotations

import asyncio
import random
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from transformers import PreTrainedTokenizerBase

from stratakv.pool.dmp_client import ConnectionCache
from stratakv.pool.meta_client import MetaClient
from stratakv.settings import MetaSettings
from stratakv.wire import ListNodes, Nodes, Segment
from tests.integration.fleet.conftest import Pool
from tests.integration.fleet.processes import Completion
from tests.integration.fleet.test_reuse import BLOCK, OUTPUT_TOKENS, prompt_of
from tests.service_process import ServiceProcess
from tests.support import eventually

BITS_FLIPPED = 64
REQUESTS_IN_TRAFFIC = 6


async def segment_of(pool: Pool, node: str) -> Segment:
    client = MetaClient(MetaSettings(native_port=pool.fleet.meta_port))
    try:
        nodes = await client.call(ListNodes(), Nodes)
        return next(n.segment for n in nodes.nodes if n.segment.node == node)
    finally:
        await client.close()


def test_a_page_with_flipped_bits_is_never_used(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = prompt_of(tokenizer, 16 * BLOCK + 5, seed=20)
    expected = pool.alone.complete(prompt, OUTPUT_TOKENS).token_ids
    connections = ConnectionCache()
    segment = asyncio.run(segment_of(pool, "dmp-0"))
    connection = connections.get(segment, deadline=time.monotonic() + 5)
    memory = connection.transport.mapping()
    assert memory is not None
    rng = random.Random(20)

    for _ in range(3):
        before = bytes(memory)
        handed_over = pool.prefill.complete(prompt, 1, kv_transfer_params={"do_remote_decode": True}).handover
        assert handed_over is not None
        assert handed_over["do_remote_prefill"]
        changed = [at for at in range(0, len(memory), 4096) if memory[at : at + 4096] != before[at : at + 4096]]
        if changed:
            written = changed
        for at in rng.sample(written, min(len(written), BITS_FLIPPED)):
            memory[at + rng.randrange(64)] ^= 1 << rng.randrange(8)
        pool.prefill.drop("l1", "l2")

        answer = pool.prefill.complete(prompt, OUTPUT_TOKENS)
        assert answer.token_ids == expected
        assert answer.tiers["computed"] > BLOCK, "damaged pages were counted as hits"
        pool.prefill.drop("l1", "l2")
    connections.close()


def in_traffic(pool: Pool, tokenizer: PreTrainedTokenizerBase, victim: ServiceProcess, seed: int) -> None:
    """Kill −9 while requests run; every one of them must be answered, and rightly."""
    prompts = [prompt_of(tokenizer, 200 + number, seed=seed + number) for number in range(REQUESTS_IN_TRAFFIC)]
    expected = [pool.alone.complete(prompt, 8).token_ids for prompt in prompts]
    with ThreadPoolExecutor(REQUESTS_IN_TRAFFIC) as threads:
        answers: list[Future[Completion]] = [threads.submit(pool.prefill.complete, prompt, 8) for prompt in prompts]
        victim.kill()
        answers += [threads.submit(pool.decode.complete, prompt, 8) for prompt in prompts]
        got = [answer.result().token_ids for answer in answers]
    assert got == expected + expected


def caching_works(pool: Pool, prompt: list[int]) -> bool:
    handover = pool.prefill.complete(prompt, 1, kv_transfer_params={"do_remote_decode": True}).handover
    pool.prefill.drop("l1", "l2")
    pool.decode.drop("l1", "l2")
    found = pool.decode.complete(prompt, 1).tiers
    pool.decode.drop("l1", "l2")
    return handover is not None and handover["do_remote_prefill"] and found.get("pool", 0) >= len(prompt) - BLOCK


@pytest.mark.parametrize("victim", ["meta", "dmp-0", "dmp-1"])
def test_a_killed_service_costs_only_cache_hits(pool: Pool, tokenizer: PreTrainedTokenizerBase, victim: str) -> None:
    process = {"meta": pool.meta, "dmp-0": pool.daemons[0], "dmp-1": pool.daemons[1]}[victim]
    seed = {"meta": 30, "dmp-0": 50, "dmp-1": 70}[victim]

    in_traffic(pool, tokenizer, process, seed)
    process.start()

    numbers = iter(range(1000))
    eventually(
        lambda: caching_works(pool, prompt_of(tokenizer, 100, seed=1000 * seed + next(numbers))),
        timeout_s=60,
        what=f"caching after {victim} is back",
    )
