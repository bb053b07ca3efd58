"""What a worker does before it is ready: run the model's shapes once, and measure its own rates."""

from __future__ import annotations

import asyncio
import random

from stratakv.keys import block_keys
from workers.engine.engine import Engine
from workers.engine.requests import EngineEvent, EngineRequest, FinishedEvent, SamplingParams
from workers.rates import Rates

PROMPT_TOKENS = 512
OUTPUT_TOKENS = 8
ROUNDS = 2
"""The first round pays for one-time work; the second is measured."""


async def warm_up(engine: Engine, rates: Rates) -> None:
    """Runs on the engine like any request, before others are let in. Raises what the engine fails with."""
    facts, block_size = engine.model.facts, engine.config.block_size
    rng = random.Random(0)
    num_tokens = min(PROMPT_TOKENS, facts.max_model_len // 2)
    for number in range(ROUNDS):
        tokens = [rng.randrange(facts.vocab_size) for _ in range(num_tokens)]
        request = EngineRequest(
            request_id=f"warm-up-{number}",
            token_ids=tokens,
            sampling=SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True),
            keys=block_keys(tokens, block_size),
        )
        finished = await _run(engine, request)
        if finished.error is not None:
            raise finished.error
        if number:
            rates.observe(finished.usage)
    await asyncio.to_thread(engine.drop_l1)


async def _run(engine: Engine, request: EngineRequest) -> FinishedEvent:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[FinishedEvent] = loop.create_future()

    def on_event(event: EngineEvent) -> None:
        if isinstance(event, FinishedEvent):
            loop.call_soon_threadsafe(ended.set_result, event)

    engine.submit(request, on_event)
    return await ended
