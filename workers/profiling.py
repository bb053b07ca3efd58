"""A worker's profile: how long its engine takes to compute prompts and decoding steps, by length and number.

Run once at the start by `workers.warmup`, before anybody is let in. Contexts are not computed for it: what attention takes does not
depend on what the KV says, so blocks of zeros stand in for them.
"""

from __future__ import annotations

import asyncio
import os
import platform
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

import torch

from stratakv.keys import block_keys
from stratakv.models import ModelIdentity
from stratakv.profile_store import ProfileKey
from stratakv.version import version
from stratakv.worker_profile import DecodePoint, PrefillPoint, WorkerProfile
from workers.engine import Engine, EngineEvent, EngineRequest, FinishedEvent, SamplingParams
from workers.engine.kernels import INTERFACE, is_supported
from workers.engine.reservations import RESERVED_SHARE_MAX

PREFILLS = ((128, 0), (16, 0), (512, 0), (64, 2048), (2048, 0), (64, 512), (8192, 0))
"""New and cached tokens, what says most first."""
BASICS = 4
"""Of these, before any decode."""
DECODES = ((1, 128), (8, 128), (1, 2048), (32, 128), (8, 1024))
"""Sequences, and context of each."""
DECODE_TOKENS = 8
SHORT_TOKENS_MAX = 512
"""Up to here a measurement is repeated: the first one of a size pays for one-time work."""
STEADY_TOKENS_MIN = 128
"""From here on the time grows with the number of tokens."""


def profile_key(model: str, identity: ModelIdentity, engine: Engine) -> ProfileKey:
    """What the profile of this engine is kept under."""
    device = engine.config.torch_device
    kernels = f"{version()}+{INTERFACE}" if is_supported() else version()
    return ProfileKey(
        model=model,
        revision=identity.revision,
        dtype=engine.model.facts.dtype,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        threads=engine.config.num_threads or os.cpu_count() or 1,
        kernels=kernels,
    )


async def measure(engine: Engine, budget_s: float) -> WorkerProfile:
    """As many points as fit into the time. Raises what the engine fails with."""
    probe = _Probe(engine, time.monotonic() + budget_s)
    prefill = [await probe.prefill(*shape) for shape in PREFILLS[:BASICS]]
    decode = [await probe.decode(*shape) for shape in DECODES[:1]]
    prefill += [await probe.prefill(*shape) for shape in PREFILLS[BASICS:]]
    decode += [await probe.decode(*shape) for shape in DECODES[1:]]
    return WorkerProfile(
        tuple(point for point in prefill if point is not None), tuple(point for point in decode if point is not None)
    )


@dataclass(slots=True)
class _Answer:
    """One request of the probe."""

    ended: asyncio.Future[FinishedEvent]
    token_times_s: list[float] = field(default_factory=list)
    """When its tokens came, on the engine's thread."""


class _Probe:
    """Measures one thing at a time, and only what probably ends in time."""

    def __init__(self, engine: Engine, deadline_s: float) -> None:
        self._engine = engine
        self._deadline_s = deadline_s
        self._rng = random.Random(0)
        self._numbers = count()
        self._token_s = self._step_s = 0.0
        """The longest time that a token of a prompt, and a step, have taken."""

    async def prefill(self, num_tokens: int, num_cached: int) -> PrefillPoint | None:
        """None if it does not fit into L1, the context or the time."""
        seconds: list[float] = []
        for _ in range(2 if num_tokens <= SHORT_TOKENS_MAX else 1):
            if not self._fits(1, num_cached, num_tokens + 1, num_tokens * self._token_s):
                break
            async with self._contexts(1, num_cached) as contexts:
                finished = await self._run([contexts[0] + self._tokens(num_tokens)], 1)
            seconds.append(finished[0][1].usage.prefill_time_s)
        if not seconds:
            return None
        if num_tokens >= STEADY_TOKENS_MIN:
            self._token_s = max(self._token_s, min(seconds) / num_tokens)
        return PrefillPoint(num_tokens, num_cached, min(seconds))

    async def decode(self, num_sequences: int, context_tokens: int) -> DecodePoint | None:
        """None if it does not fit into L1, the context or the time."""
        if num_sequences > self._engine.config.max_running:
            return None
        if not self._fits(num_sequences, context_tokens, 1 + DECODE_TOKENS, DECODE_TOKENS * self._step_s):
            return None
        async with self._contexts(num_sequences, context_tokens) as contexts:
            finished = await self._run([context + self._tokens(1) for context in contexts], DECODE_TOKENS)
        step_s = _step_s([answer.token_times_s for answer, _ in finished])
        self._step_s = max(self._step_s, step_s)
        return DecodePoint(num_sequences, context_tokens, step_s)

    def _fits(self, num_sequences: int, num_cached: int, num_new: int, expected_s: float) -> bool:
        config = self._engine.config
        num_blocks = num_sequences * -(-(num_cached + num_new) // config.block_size)
        return (
            num_blocks <= config.num_blocks * RESERVED_SHARE_MAX
            and num_cached + num_new <= self._engine.model.facts.max_model_len
            and time.monotonic() + expected_s <= self._deadline_s
        )

    def _tokens(self, num_tokens: int) -> list[int]:
        vocab_size = self._engine.model.facts.vocab_size
        return [self._rng.randrange(vocab_size) for _ in range(num_tokens)]

    @asynccontextmanager
    async def _contexts(self, num_sequences: int, num_tokens: int) -> AsyncIterator[list[list[int]]]:
        """Prompts whose blocks L1 takes for computed; forgotten at the end."""
        block_size, reservations = self._engine.config.block_size, self._engine.reservations
        num_tokens -= num_tokens % block_size
        prompts = [self._tokens(num_tokens) for _ in range(num_sequences)]
        keys = [key for prompt in prompts for key in block_keys(prompt, block_size)]
        blocks = await asyncio.wrap_future(reservations.reserve(len(keys))) if keys else []
        await asyncio.wrap_future(reservations.register(keys[: len(blocks)], blocks))
        try:
            yield prompts
        finally:
            reservations.release(blocks)
            await asyncio.to_thread(self._engine.drop_l1)

    async def _run(self, prompts: Sequence[list[int]], max_tokens: int) -> list[tuple[_Answer, FinishedEvent]]:
        """All of them at once. Raises what one of them fails with."""
        answers = [self._submit(prompt, max_tokens) for prompt in prompts]
        finished = [(answer, await answer.ended) for answer in answers]
        for _, event in finished:
            if event.error is not None:
                raise event.error
        return finished

    def _submit(self, prompt: list[int], max_tokens: int) -> _Answer:
        loop = asyncio.get_running_loop()
        answer = _Answer(loop.create_future())

        def on_event(event: EngineEvent) -> None:
            if isinstance(event, FinishedEvent):
                loop.call_soon_threadsafe(answer.ended.set_result, event)
            else:
                answer.token_times_s.append(time.monotonic())

        request = EngineRequest(
            request_id=f"profile-{next(self._numbers)}",
            token_ids=prompt,
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            keys=block_keys(prompt, self._engine.config.block_size),
        )
        self._engine.submit(request, on_event)
        return answer


def _step_s(token_times_s: Sequence[Sequence[float]]) -> float:
    """The median step in which all sequences were decoded."""
    first, last = max(times[0] for times in token_times_s), min(times[-1] for times in token_times_s)
    steps = [b - a for times in token_times_s for a, b in pairwise(times) if first <= a and b <= last]
    return statistics.median(steps or [b - a for times in token_times_s for a, b in pairwise(times)])


def _processor() -> str:
    """Its name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
