"""A preempted request goes on from what L1 kept, then from what lies below if that is cheaper, else it is computed again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from stratakv.keys import BlockKey
from tests.support import eventually
from tests.unit.workers.engine.harness import (
    Listener,
    MemoryTier,
    Oracle,
    fp32,
    prompt,
    request,
    running,
    submit,
)
from workers.engine import Engine, FinishReason
from workers.engine.connector import OnFound, Tier
from workers.engine.kv_cache import KVCache

PROMPTS = [prompt(60, 33), prompt(61, 33), prompt(62, 33)]
NUM_TOKENS = 60
TIGHT = {"num_blocks": 12, "block_size": 8}
"""One request fills it, so that two preempt one another's successor."""
LOST_BLOCKS_MIN = 4


@pytest.fixture(scope="module")
def expected(oracle: Oracle) -> list[list[int]]:
    return [oracle.greedy(token_ids, NUM_TOKENS) for token_ids in PROMPTS]


class Below:
    """Makes the lower tier and keeps it for the test."""

    made: MemoryTier

    def __init__(self, kind: type[MemoryTier] = MemoryTier, **fault: int) -> None:
        self._kind = kind
        self._fault = fault

    def __call__(self, cache: KVCache) -> MemoryTier:
        self.made = self._kind(cache, fault=self._fault)
        return self.made


def submit_all(engine: Engine) -> list[Listener]:
    return [
        submit(engine, request(token_ids, NUM_TOKENS, request_id=str(i), block_size=8))
        for i, token_ids in enumerate(PROMPTS)
    ]


def test_what_a_preemption_lost_is_loaded_back(tiny: Path, expected: list[list[int]]) -> None:
    below = Below()
    with running(fp32(tiny, **TIGHT), below) as engine:
        results = [listener.result() for listener in submit_all(engine)]
        stats = engine.stats()
        eventually(lambda: engine.stats().blocks_referenced == 0)
    assert [tokens for tokens, _ in results] == expected
    assert stats.preemptions == sum(event.usage.preemptions for _, event in results) > 0
    assert stats.recovered_tokens[Tier.POOL] >= LOST_BLOCKS_MIN * 8
    assert stats.recovered_tokens[Tier.COMPUTED] < stats.preemptions * 8, "only blocks that were not full are computed"
    assert all(hit.num_released == 1 for hit in below.made.hits)
    assert all(sum(event.usage.tokens_by_tier.values()) == 33 for _, event in results)


def test_what_is_dearer_to_load_is_computed(tiny: Path, expected: list[list[int]]) -> None:
    class Slow(MemoryTier):
        def find(self, keys: Sequence[BlockKey], num_l1_blocks: int, on_found: OnFound) -> None:
            on_found(None)

    with running(fp32(tiny, **TIGHT), Below(Slow)) as engine:
        assert [listener.result()[0] for listener in submit_all(engine)] == expected
        stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.recovered_tokens[Tier.POOL] == 0
    assert stats.recovered_tokens[Tier.COMPUTED] >= LOST_BLOCKS_MIN * 8


@pytest.mark.parametrize("num_good_blocks", [0, 2])
def test_what_does_not_arrive_is_computed(tiny: Path, expected: list[list[int]], num_good_blocks: int) -> None:
    below = Below(fail_layer=1, num_good_blocks=num_good_blocks)
    with running(fp32(tiny, **TIGHT), below) as engine:
        assert [listener.result()[0] for listener in submit_all(engine)] == expected
        recovered = engine.stats().recovered_tokens
        eventually(lambda: engine.stats().blocks_referenced == 0)
    num_loads = sum(len(hit.loads) for hit in below.made.hits)
    assert num_loads > 0
    assert recovered[Tier.POOL] == num_loads * num_good_blocks * 8
    assert recovered[Tier.COMPUTED] > 0


class Late(MemoryTier):
    """Answers when it is told to, from another thread."""

    def __init__(self, cache: KVCache, fault: dict[str, int]) -> None:
        super().__init__(cache, fault=fault)
        self.asked = threading.Event()
        self.answer = threading.Event()
        self.answered: list[threading.Thread] = []

    def find(self, keys: Sequence[BlockKey], num_l1_blocks: int, on_found: OnFound) -> None:
        def later() -> None:
            assert self.answer.wait(60.0)
            self.hits.append(self.hit(keys, num_l1_blocks))
            on_found(self.hits[-1])

        self.answered.append(threading.Thread(target=later))
        self.answered[-1].start()
        self.asked.set()


def test_nobody_is_held_up_by_an_answer_that_comes_late(tiny: Path, expected: list[list[int]]) -> None:
    below = Below(Late)
    with running(fp32(tiny, **TIGHT), below) as engine:
        late = below.made
        assert isinstance(late, Late)
        listeners = submit_all(engine)
        assert late.asked.wait(60.0)
        assert listeners[0].result()[0] == expected[0], "the one that runs goes on"
        late.answer.set()
        assert [listener.result()[0] for listener in listeners[1:]] == expected[1:]


def test_a_request_that_ends_while_it_is_looked_for_gives_back_what_is_found(tiny: Path) -> None:
    below = Below(Late)
    with running(fp32(tiny, **TIGHT), below) as engine:
        late = below.made
        assert isinstance(late, Late)
        listeners = submit_all(engine)
        assert late.asked.wait(60.0)
        for i in range(len(PROMPTS)):
            engine.cancel(str(i))
        reasons = [listener.result()[1].reason for listener in listeners]
        late.answer.set()
        for thread in late.answered:
            thread.join(60.0)
        eventually(lambda: all(hit.num_released == 1 for hit in late.hits))
        eventually(lambda: engine.stats().blocks_referenced == 0)
    assert FinishReason.CANCELLED in reasons
    assert all(not hit.loads for hit in late.hits)
