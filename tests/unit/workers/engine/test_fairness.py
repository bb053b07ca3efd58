"""No request starves in the engine's scheduler: it ends after a number of steps that only what is ahead of it bounds.

The scheduler and the books of L1 are the real ones; only the model is left out.
"""

from __future__ import annotations

from collections.abc import Sequence as Blocks
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stratakv.keys import block_keys
from workers.engine.config import EngineConfig, EngineDtype
from workers.engine.connector import LoadJob, Tier
from workers.engine.kv_cache import KVCache
from workers.engine.model_config import ModelFacts
from workers.engine.requests import EngineRequest, SamplingParams
from workers.engine.scheduler import Scheduler, StepPart
from workers.engine.sequence import Sequence

BLOCK = 4
FACTS = ModelFacts(1, 1, 2, 1000, 512, frozenset(), EngineDtype.FP32)
BLOCK_BYTES = 2 * BLOCK * 2 * 4
WAITING_MAX = 24
PROMPT_MAX, OUTPUT_MAX = 24, 12


@dataclass(frozen=True)
class Shape:
    """A kind of request: those of one family share all the prefix that they both have."""

    family: int
    shared_tokens: int
    own_tokens: int
    output_tokens: int
    is_below: bool
    """All of its prompt can be loaded."""

    def token_ids(self, number: int) -> list[int]:
        shared = [self.family] * self.shared_tokens
        return [*shared, *([100 + number % 800] * self.own_tokens), 99]


SHAPES = st.builds(
    Shape,
    family=st.integers(0, 2),
    shared_tokens=st.integers(0, PROMPT_MAX - 9),
    own_tokens=st.integers(0, 8),
    output_tokens=st.integers(1, OUTPUT_MAX),
    is_below=st.booleans(),
)
LIMITS = st.fixed_dictionaries(
    {
        "num_blocks": st.integers((PROMPT_MAX + OUTPUT_MAX) // BLOCK, 24),
        "max_running": st.integers(1, 5),
        "max_batched_tokens": st.integers(1, 16),
        "max_prefill_tokens_beside_decode": st.integers(1, 8),
        "prefix_caching": st.booleans(),
        "load_ahead_requests": st.integers(0, 4),
        "load_ahead_bytes": st.sampled_from([0, 5 * BLOCK_BYTES, 2**30]),
    }
)


class Loading:
    """A load that is stopped, at the latest by the time its blocks are given back."""

    def __init__(self) -> None:
        self.is_over = False

    def wait_layer(self, layer: int) -> None:
        raise NotImplementedError

    def cancel(self) -> None:
        self.is_over = True


class Found:
    """What lies below of a request: all of it."""

    def __init__(self, start_block: int, num_blocks: int) -> None:
        self.start_block = start_block
        self.tiers = [Tier.POOL] * num_blocks
        self.ahead: list[Loading] = []

    def load(self, first_block: int, l1_blocks: Blocks[int]) -> LoadJob:
        raise NotImplementedError

    def load_ahead(self, first_block: int, l1_blocks: Blocks[int]) -> LoadJob:
        self.ahead.append(Loading())
        return self.ahead[-1]

    def release(self) -> None:
        assert all(loading.is_over for loading in self.ahead), "nothing reads what is given back"


class World:
    """Runs the scheduler step by step; each sampled token is a number of its own."""

    def __init__(self, limits: dict[str, int], answer_after: int, loads_fail: bool) -> None:
        self.config = EngineConfig(Path(), EngineDtype.FP32, "cpu", BLOCK, **limits)
        self.cache = KVCache(FACTS, self.config.num_blocks, BLOCK, torch.device("cpu"))
        self.scheduler = Scheduler(self.config, self.cache, self.cache.release, self._find)
        self.step_number = 0
        self._answer_after = answer_after
        self._loads_fail = loads_fail
        self._answers: list[tuple[int, Sequence, Found]] = []
        self._numbers = count()

    def arrive(self, shape: Shape) -> Sequence:
        number = next(self._numbers)
        token_ids = shape.token_ids(number)
        sampling = SamplingParams(max_tokens=shape.output_tokens)
        keys = block_keys(token_ids, BLOCK)
        below = Found(0, len(keys)) if shape.is_below else None
        request = EngineRequest(str(number), token_ids, sampling, keys, external=below)
        sequence = Sequence(request, lambda event: None, BLOCK, seed=0, arrived_at=0.0)
        self.scheduler.waiting.append(sequence)
        return sequence

    def step(self) -> None:
        oldest = next(iter(self.scheduler.running), None)
        for due, sequence, found in list(self._answers):
            if due <= self.step_number:
                self._answers.remove((due, sequence, found))
                self.scheduler.found(sequence, found)
        running = set(self.scheduler.running)
        parts = self.scheduler.schedule()
        for part in parts:
            if part.sequence not in running:
                self._check_overtaken(part.sequence)
        assert sum(part.num_tokens for part in parts) <= self.config.max_batched_tokens
        assert oldest is None or oldest in [part.sequence for part in parts], "the oldest goes on in every step"
        for part in parts:
            self._compute(part)
        self.cache.check()
        self.step_number += 1

    def _check_overtaken(self, admitted: Sequence) -> None:
        """Of those that were before it in the queue, only such as wait for a block which a running one computes."""
        promised = {key for s in self.scheduler.running for key in s.keys[s.num_registered :]}
        for waiting in self.scheduler.waiting:
            if _rank(waiting) < _rank(admitted):
                assert self.scheduler.ahead.of(waiting) is None
                keys = waiting.keys[: waiting.num_reusable_blocks]
                assert self.config.prefix_caching
                assert keys[self.cache.num_cached(keys)] in promised

    def _compute(self, part: StepPart) -> None:
        sequence = part.sequence
        if part.load_first_block is not None:
            if part.load_job is not None:
                part.load_job.cancel()
            sequence.release_external()
            if self._loads_fail:
                self.scheduler.load_failed(part, 0)
                return
        samples = part.samples
        self.scheduler.computed(part)
        if samples:
            sequence.append(500 + len(sequence.token_ids))
            if sequence.num_generated == sequence.request.sampling.max_tokens:
                self.scheduler.remove(sequence)

    def _find(self, sequence: Sequence, num_l1_blocks: int) -> bool:
        if self._answer_after == 0:
            return False
        found = Found(num_l1_blocks, max(0, sequence.num_lost // BLOCK - num_l1_blocks))
        self._answers.append((self.step_number + self._answer_after, sequence, found))
        return True

    def num_steps_until_done(self, sequence: Sequence, num_steps_max: int, arrivals: list[list[Shape]]) -> int:
        """While others arrive without end."""
        for num_steps, shapes in zip(range(num_steps_max + 1), cycle(arrivals), strict=False):
            if sequence not in self.scheduler.sequences():
                return num_steps
            for shape in shapes:
                if len(self.scheduler.waiting) < WAITING_MAX:
                    self.arrive(shape)
            self.step()
        raise AssertionError(f"not done after {num_steps_max} steps, preempted {sequence.preemptions} times")


def _rank(sequence: Sequence) -> float:
    """Preempted ones come first, whatever their order; then those that never ran, by arrival."""
    return -1.0 if sequence.preemptions else float(sequence.request_id)


@settings(max_examples=100)
@given(
    limits=LIMITS,
    ahead=st.lists(SHAPES, max_size=8),
    victim=SHAPES,
    arrivals=st.lists(st.lists(SHAPES, max_size=3), min_size=1, max_size=4),
    answer_after=st.integers(0, 3),
    loads_fail=st.booleans(),
)
def test_every_request_ends_whatever_arrives_after_it(
    limits: dict[str, int],
    ahead: list[Shape],
    victim: Shape,
    arrivals: list[list[Shape]],
    answer_after: int,
    loads_fail: bool,
) -> None:
    world = World(limits, answer_after, loads_fail)
    for shape in ahead:
        world.arrive(shape)
    sequence = world.arrive(victim)
    # Alone and token by token, a request takes so many steps; those that start while the victim waits for a block that
    # another one computes are no more than may run at once.
    steps_each = PROMPT_MAX + 2 * OUTPUT_MAX + answer_after
    overtaking = 2 * world.config.max_running
    num_steps = world.num_steps_until_done(sequence, (len(ahead) + overtaking + 1) * steps_each, arrivals)
    assert sequence.preemptions <= num_steps


@settings(max_examples=60)
@given(limits=LIMITS, shapes=st.lists(SHAPES, min_size=1, max_size=20), answer_after=st.integers(0, 3))
def test_preemptions_are_no_more_than_the_blocks_that_others_grow_by(
    limits: dict[str, int], shapes: list[Shape], answer_after: int
) -> None:
    world = World(limits, answer_after, loads_fail=False)
    for shape in shapes:
        world.arrive(shape)
    while list(world.scheduler.sequences()):
        world.step()
        assert world.step_number < 20 * len(shapes) * (PROMPT_MAX + OUTPUT_MAX)
    num_growths = sum(-(-shape.output_tokens // BLOCK) + 1 for shape in shapes)
    assert world.scheduler.num_preemptions <= num_growths * world.config.max_running
    assert world.cache.use.referenced == 0
