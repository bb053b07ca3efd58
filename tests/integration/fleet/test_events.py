"""A real worker tells routers which blocks of a prompt its L1 holds, and that it has dropped them."""

from __future__ import annotations

import asyncio
import contextlib

from transformers import PreTrainedTokenizerBase

from dbnode.kv_events.feed import KvFeed
from dbnode.kv_events.subscriber import KvSubscriber
from dbnode.scheduler.index import BlockIndex
from stratakv.keys import block_keys
from tests.integration.fleet.conftest import Pool
from tests.integration.fleet.test_reuse import BLOCK, prompt_of
from tests.support import eventually_async


async def test_what_a_prompt_leaves_in_l1_is_told(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    worker, prompt = pool.prefill, prompt_of(tokenizer, 200, seed=77)
    keys = block_keys(prompt, BLOCK)
    info = await asyncio.to_thread(worker.get, "/info")
    index = BlockIndex(10_000)
    feed = KvFeed(index, info["block_size"], has_our_keys=True)
    task = asyncio.create_task(KvSubscriber("w", info["events"], info["replay"], feed).run())
    try:
        await asyncio.to_thread(worker.complete, prompt, 2)
        await eventually_async(lambda: index.match(keys) == len(keys), what="the prompt's blocks are told")
        await asyncio.to_thread(worker.drop, "l1")
        await eventually_async(lambda: index.match(keys) == 0, what="their drop is told")
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
