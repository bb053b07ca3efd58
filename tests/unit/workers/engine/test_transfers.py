"""Loads from and write-downs to lower tiers, layer by layer: right tokens, or a recompute, and nothing half-done is seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from stratakv.errors import Unavailable
from stratakv.keys import BlockKey
from tests.support import eventually
from tests.unit.workers.engine.harness import (
    MemoryHit,
    MemoryLoad,
    MemorySave,
    MemoryTier,
    Oracle,
    fp32,
    generate,
    prompt,
    request,
    running,
    submit,
)
from workers.engine import FinishReason
from workers.engine.connector import Tier
from workers.engine.errors import NotFinite
from workers.engine.kv_cache import KVCache

NUM_TOKENS = 12
PROMPT = prompt(31, 85)
KEYS = request(PROMPT, 1).keys
NUM_LAYERS = 3


class Tiers:
    """Makes the lower tier once the cache exists, and keeps it for the test."""

    def __init__(self) -> None:
        self.made: list[MemoryTier] = []

    def __call__(self, cache: KVCache) -> MemoryTier:
        pages = self.made[-1].pages if self.made else {}
        self.made.append(MemoryTier(cache, pages))
        return self.made[-1]

    @property
    def now(self) -> MemoryTier:
        return self.made[-1]


@pytest.fixture
def tiers() -> Tiers:
    return Tiers()


@pytest.fixture
def expected(oracle: Oracle) -> list[int]:
    return oracle.greedy(PROMPT, NUM_TOKENS)


def test_every_filled_block_is_written_down_once_with_its_key(tiny: Path, tiers: Tiers) -> None:
    with running(fp32(tiny, max_batched_tokens=23), tiers) as engine:
        tokens, _ = generate(engine, PROMPT, NUM_TOKENS)
        everything = request([*PROMPT, *tokens[:-1]], 1).keys
        assert set(tiers.now.pages) == set(everything)
        generate(engine, PROMPT, 1)
        eventually(lambda: engine.stats().blocks_referenced == 0)


def test_loaded_blocks_give_the_same_tokens_and_serve_from_l1_later(
    tiny: Path, tiers: Tiers, expected: list[int]
) -> None:
    with running(fp32(tiny), tiers) as engine:
        generate(engine, PROMPT, 1)
    with running(fp32(tiny), tiers) as engine:
        hit = tiers.now.hit(KEYS, 0)
        tokens, finished = generate(engine, PROMPT, NUM_TOKENS, external=hit)
        assert engine.num_cached_blocks(KEYS) == 5
    assert tokens == expected
    assert finished.usage.tokens_by_tier == {**dict.fromkeys(Tier, 0), Tier.POOL: 80, Tier.COMPUTED: 5}
    assert hit.loads[0].waited == list(range(NUM_LAYERS))
    assert hit.num_released == 1


def test_only_what_l1_lacks_is_loaded(tiny: Path, tiers: Tiers, expected: list[int]) -> None:
    with running(fp32(tiny), tiers) as engine:
        generate(engine, PROMPT, 1)
    with running(fp32(tiny), tiers) as engine:
        generate(engine, PROMPT[:40], 1)
        hit = tiers.now.hit(KEYS, 1)
        tokens, finished = generate(engine, PROMPT, NUM_TOKENS, external=hit)
    assert tokens == expected
    assert finished.usage.tokens_by_tier[Tier.L1] == 32
    assert finished.usage.tokens_by_tier[Tier.POOL] == 48


def test_a_hit_that_does_not_adjoin_l1_is_given_back_unused(tiny: Path, tiers: Tiers, expected: list[int]) -> None:
    with running(fp32(tiny), tiers) as engine:
        generate(engine, PROMPT, 1)
    with running(fp32(tiny), tiers) as engine:
        hit = tiers.now.hit(KEYS, 2)
        tokens, finished = generate(engine, PROMPT, NUM_TOKENS, external=hit)
    assert tokens == expected
    assert finished.usage.tokens_by_tier[Tier.COMPUTED] == len(PROMPT)
    assert (hit.loads, hit.num_released) == ([], 1)


@pytest.mark.parametrize("num_good_blocks", [0, 2])
@pytest.mark.parametrize("fail_layer", [0, 1, NUM_LAYERS - 1])
def test_a_failed_load_is_computed_instead_and_harms_nobody(
    tiny: Path, tiers: Tiers, expected: list[int], oracle: Oracle, fail_layer: int, num_good_blocks: int
) -> None:
    with running(fp32(tiny), tiers) as engine:
        generate(engine, PROMPT, 1)
    with running(fp32(tiny), tiers) as engine:
        hit = tiers.now.hit(KEYS, 0, fail_layer=fail_layer, num_good_blocks=num_good_blocks)
        other = prompt(77, 30)
        beside = submit(engine, request(other, 30, request_id="beside"))
        beside.wait_first()
        tokens, finished = generate(engine, PROMPT, NUM_TOKENS, external=hit)
        assert hit.loads[0].cancelled
        assert finished.usage.tokens_by_tier[Tier.POOL] == num_good_blocks * 16
        assert finished.usage.tokens_by_tier[Tier.COMPUTED] == len(PROMPT) - num_good_blocks * 16
        assert beside.result()[0] == oracle.greedy(other, 30)[1:]
        again, cached = generate(engine, PROMPT, NUM_TOKENS)
    assert tokens == again == expected
    assert cached.usage.tokens_by_tier[Tier.L1] == 80


def test_what_is_written_down_is_its_requests_owners(tiny: Path, tiers: Tiers) -> None:
    with running(fp32(tiny), tiers) as engine:
        mine = replace(request(PROMPT[:40], 1, request_id="mine"), owner=7)
        others = replace(request(PROMPT, 1, request_id="others"), owner=8)
        for asked in (mine, others):
            submit(engine, asked).result()
        assert [tiers.now.owners[key] for key in KEYS] == [7] * 2 + [8] * 3


def test_blocks_being_written_down_are_not_given_away(tiny: Path) -> None:
    class Stalled(MemoryTier):
        """Never finishes until told to."""

        def __init__(self, cache: KVCache) -> None:
            super().__init__(cache)
            self.held: list[Callable[[], None]] = []

        def save(
            self, keys: Sequence[BlockKey], l1_blocks: Sequence[int], owner: int, on_finished: Callable[[], None]
        ) -> MemorySave:
            self.held.append(on_finished)
            return super().save(keys, l1_blocks, owner, lambda: None)

    made: list[Stalled] = []

    def connect(cache: KVCache) -> Stalled:
        made.append(Stalled(cache))
        return made[0]

    with running(fp32(tiny, num_blocks=6), connect) as engine:
        generate(engine, PROMPT, 1)
        eventually(lambda: engine.stats().running == 0)
        assert engine.stats().blocks_referenced == 5
        assert engine.drop_l1() == 0
        waiting = submit(engine, request(prompt(40, 60), 1, request_id="waiting"))
        eventually(lambda: engine.stats().waiting == 1)
        for finished in made[0].held:
            finished()
        assert waiting.result()[1].reason is FinishReason.LENGTH


def test_a_request_that_is_not_finite_writes_nothing_down(tiny_with_nan: Path, tiers: Tiers) -> None:
    with running(fp32(tiny_with_nan), tiers) as engine:
        poisoned = submit(engine, request([*PROMPT[:40], 0], 4, request_id="poisoned"))
        healthy = submit(engine, request(PROMPT, 4, request_id="healthy"))
        _, event = poisoned.result()
        assert event.reason is FinishReason.ERROR
        assert isinstance(event.error, NotFinite)
        assert healthy.result()[1].reason is FinishReason.LENGTH
        assert tiers.now.num_aborted == 1
        assert set(tiers.now.pages) == set(KEYS)
        assert engine.num_cached_blocks(KEYS) == 5


def test_a_load_that_cannot_start_and_a_save_that_is_refused_are_only_misses(
    tiny: Path, tiers: Tiers, expected: list[int]
) -> None:
    class Refusing(MemoryTier):
        def save(
            self, keys: Sequence[BlockKey], l1_blocks: Sequence[int], owner: int, on_finished: Callable[[], None]
        ) -> MemorySave:
            raise Unavailable("no room")

    class Unreachable(MemoryHit):
        def load(self, first_block: int, l1_blocks: Sequence[int]) -> MemoryLoad:
            raise Unavailable("gone")

    with running(fp32(tiny), Refusing) as engine:
        hit = Unreachable(Refusing(engine.kv_cache), 0, list(KEYS))
        tokens, finished = generate(engine, PROMPT, NUM_TOKENS, external=hit)
        eventually(lambda: engine.stats().blocks_referenced == 0)
    assert tokens == expected
    assert finished.usage.tokens_by_tier[Tier.COMPUTED] == len(PROMPT)
    assert hit.num_released == 1


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_hits_failures_cancels_and_preemptions_gives_the_oracles_tokens(
    tiny: Path, tiers: Tiers, seed: int
) -> None:
    rng = random.Random(seed)
    prefixes = [prompt(100 + i, 16 * rng.randrange(0, 6)) for i in range(3)]
    jobs = [(rng.choice(prefixes) + prompt(200 + i, rng.randrange(1, 40)), rng.randrange(1, 24)) for i in range(24)]
    with running(fp32(tiny, num_blocks=256, prefix_caching=False), tiers) as engine:
        expected = [generate(engine, token_ids, count)[0] for token_ids, count in jobs]
    settings = {"num_blocks": 24, "max_running": 5, "max_batched_tokens": rng.choice([19, 64, 4096])}
    with running(fp32(tiny, **settings), tiers) as engine:
        listeners = []
        for i, (token_ids, count) in enumerate(jobs):
            what = request(token_ids, count, request_id=str(i))
            fault = {"fail_layer": rng.randrange(-2, NUM_LAYERS), "num_good_blocks": rng.randrange(3)}
            what.external = tiers.now.hit(what.keys, rng.choice([0, 0, engine.num_cached_blocks(what.keys)]), **fault)
            listeners.append(submit(engine, what))
            if rng.random() < 0.2:
                engine.cancel(str(rng.randrange(i + 1)))
        for listener, tokens in zip(listeners, expected, strict=True):
            got, finished = listener.result()
            assert finished.reason in (FinishReason.LENGTH, FinishReason.CANCELLED)
            assert got == tokens[: len(got)]
            assert len(got) == len(tokens) or finished.reason is FinishReason.CANCELLED
        eventually(lambda: engine.stats().blocks_referenced == 0)
