"""What a worker does before it is ready: run the model's shapes once, and measure itself if it has not done so of late."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from stratakv.keys import block_keys
from stratakv.log import EventLogger
from stratakv.profile_store import ProfileKey, ProfileStore
from stratakv.worker_profile import Curves, WorkerProfile
from workers.engine.engine import Engine
from workers.engine.requests import EngineEvent, EngineRequest, FinishedEvent, SamplingParams
from workers.profiling import measure
from workers.rates import Rates

log = EventLogger("workers.warmup")

PROMPT_TOKENS = 512
OUTPUT_TOKENS = 8
ROUNDS = 2
"""The first round pays for one-time work; the second is measured."""
TURN_S_MAX = 5.0
"""Another worker of this machine is waited for so long while it warms up, besides the time for its profile."""


@dataclass(frozen=True, slots=True)
class Profiling:
    """Where profiles are kept, and how long making one may take."""

    store: ProfileStore
    key: ProfileKey
    budget_s: float
    """0: none is made, and none is used."""
    measure_tiers: Callable[[], Awaitable[dict[str, float]]] | None
    """Bytes per second of those that can be tried."""


async def warm_up(engine: Engine, rates: Rates, profiling: Profiling) -> None:
    """Runs on the engine like any request, before others are let in. Raises what the engine fails with."""
    with ExitStack() as stack:
        if profiling.budget_s > 0 and profiling.store.find(profiling.key) is None:
            # Workers of one machine start together: each measured beside the others would seem slow.
            await asyncio.to_thread(stack.enter_context, profiling.store.turn(TURN_S_MAX + 2 * profiling.budget_s))
        for number in range(ROUNDS):
            finished = await _run(engine, number)
            if number:
                rates.observe(finished.usage)
        await asyncio.to_thread(engine.drop_l1)
        if profiling.budget_s > 0:
            rates.use_profile(profiling.store.find(profiling.key) or await _measured(engine, profiling))


async def _measured(engine: Engine, profiling: Profiling) -> WorkerProfile:
    profile = await measure(engine, profiling.budget_s)
    if profiling.measure_tiers is not None:
        profile = msgspec.structs.replace(profile, load_bytes_per_s=await profiling.measure_tiers())
    is_kept = Curves(profile).is_complete and bool(profile.decode)
    if is_kept:
        profiling.store.keep(profiling.key, profile)
    log.info("profile_measured", prefills=len(profile.prefill), decodes=len(profile.decode), is_kept=is_kept)
    return profile


async def _run(engine: Engine, number: int) -> FinishedEvent:
    facts, config = engine.model.facts, engine.config
    rng = random.Random(number)
    num_tokens = min(PROMPT_TOKENS, facts.max_model_len // 2, config.num_blocks * config.block_size // 2)
    tokens = [rng.randrange(facts.vocab_size) for _ in range(num_tokens)]
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[FinishedEvent] = loop.create_future()

    def on_event(event: EngineEvent) -> None:
        if isinstance(event, FinishedEvent):
            loop.call_soon_threadsafe(ended.set_result, event)

    request = EngineRequest(
        request_id=f"warm-up-{number}",
        token_ids=tokens,
        sampling=SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True),
        keys=block_keys(tokens, engine.config.block_size),
    )
    engine.submit(request, on_event)
    finished = await ended
    if finished.error is not None:
        raise finished.error
    return finished
