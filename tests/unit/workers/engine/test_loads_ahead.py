"""Requests that wait have their blocks loaded meanwhile, from nobody's share, and nothing is left of those that end before."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from stratakv.errors import Unavailable
from tests.support import eventually
from tests.unit.workers.engine.harness import (
    TIMEOUT_S,
    Listener,
    MemoryHit,
    MemoryLoad,
    MemoryTier,
    Oracle,
    fp32,
    generate,
    prompt,
    request,
    running,
    submit,
)
from workers.engine import Engine, EngineConfig, EngineEvent, FinishReason
from workers.engine.connector import Tier
from workers.engine.kv_cache import KVCache

NUM_TOKENS = 6
PROMPTS = [prompt(80 + number, 85) for number in range(3)]
LOADED = 85 // 16
RUNNING = prompt(90, 20)


class Below:
    """Makes the lower tier, with what was written down before, and keeps it for the test."""

    def __init__(self) -> None:
        self.made: list[MemoryTier] = []

    def __call__(self, cache: KVCache) -> MemoryTier:
        self.made.append(MemoryTier(cache, self.made[-1].pages if self.made else {}))
        return self.made[-1]

    def hit(self, number: int, **fault: int) -> MemoryHit:
        return self.made[-1].hit(request(PROMPTS[number], 1).keys, 0, **fault)


class Stepping(Listener):
    """Holds the engine up at each event of a request until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self._may_go_on = threading.Semaphore(0)

    def take(self, event: EngineEvent) -> None:
        self.events.put(event)
        assert self._may_go_on.acquire(timeout=TIMEOUT_S)

    def step(self) -> None:
        """Until the next token."""
        self._may_go_on.release()
        self.wait_first()

    def let_go(self) -> None:
        self._may_go_on.release(1000)


@pytest.fixture
def below(tiny: Path) -> Below:
    """All prompts lie there."""
    made = Below()
    with running(fp32(tiny), made) as engine:
        for token_ids in PROMPTS:
            generate(engine, token_ids, 1)
    return made


@pytest.fixture
def expected(oracle: Oracle) -> list[list[int]]:
    return [oracle.greedy(token_ids, NUM_TOKENS) for token_ids in PROMPTS]


def one_at_a_time(tiny: Path, **settings: int) -> EngineConfig:
    return fp32(tiny, max_running=1, **settings)


def busy(engine: Engine, num_tokens: int = 4) -> Stepping:
    """A request that runs; it holds the engine up after its first token."""
    listener = Stepping()
    engine.submit(request(RUNNING, num_tokens, request_id="running"), listener.take)
    listener.wait_first()
    return listener


def wait_behind(engine: Engine, number: int, hit: MemoryHit) -> Listener:
    return submit(engine, request(PROMPTS[number], NUM_TOKENS, request_id=str(number), external=hit))


def test_blocks_are_there_when_the_requests_turn_comes(tiny: Path, below: Below, expected: list[list[int]]) -> None:
    with running(one_at_a_time(tiny), below) as engine:
        first = busy(engine)
        hit = below.hit(0)
        waiting = wait_behind(engine, 0, hit)
        first.step()
        hit.loads[0].join()
        assert (hit.num_ahead, hit.loads[0].waited) == (1, []), "all of it has come before any step waits for it"
        first.let_go()
        tokens, finished = waiting.result()
        stats = engine.stats()
        eventually(lambda: engine.stats().blocks_referenced == 0)
    assert tokens == expected[0]
    assert finished.usage.tokens_by_tier == {**dict.fromkeys(Tier, 0), Tier.POOL: LOADED * 16, Tier.COMPUTED: 5}
    assert (len(hit.loads), hit.num_released) == (1, 1)
    assert (stats.ahead_used_blocks, stats.ahead_dropped_blocks) == (LOADED, 0)


@pytest.mark.parametrize("num_good_blocks", [0, 2])
def test_what_does_not_arrive_is_computed(
    tiny: Path, below: Below, expected: list[list[int]], num_good_blocks: int
) -> None:
    with running(one_at_a_time(tiny), below) as engine:
        first = busy(engine)
        hit = below.hit(0, fail_layer=1, num_good_blocks=num_good_blocks)
        waiting = wait_behind(engine, 0, hit)
        first.let_go()
        tokens, finished = waiting.result()
        eventually(lambda: engine.stats().blocks_referenced == 0)
    assert tokens == expected[0]
    assert hit.num_ahead == 1
    assert finished.usage.tokens_by_tier[Tier.POOL] == num_good_blocks * 16


def test_a_request_that_is_cancelled_gives_everything_back(tiny: Path, below: Below) -> None:
    with running(one_at_a_time(tiny), below) as engine:
        first = busy(engine)
        hit = below.hit(0)
        waiting = wait_behind(engine, 0, hit)
        first.step()
        engine.cancel("0")
        first.let_go()
        assert waiting.result()[1].reason is FinishReason.CANCELLED
        eventually(lambda: engine.stats().blocks_referenced == 0)
        assert engine.stats().ahead_dropped_blocks == LOADED
    assert (hit.loads[0].cancelled, hit.num_released) == (True, 1)


def test_an_engine_that_ends_stops_what_it_loads_ahead(tiny: Path, below: Below) -> None:
    with running(one_at_a_time(tiny), below) as engine:
        first = busy(engine)
        hit = below.hit(0)
        waiting = wait_behind(engine, 0, hit)
        first.step()
        ending = threading.Thread(target=engine.shutdown)
        ending.start()
        first.let_go()
        ending.join(TIMEOUT_S)
        assert isinstance(waiting.result()[1].error, Unavailable)
    assert (hit.loads[0].cancelled, hit.num_released) == (True, 1)


def test_a_running_request_takes_the_room_back(tiny: Path, below: Below, expected: list[list[int]]) -> None:
    """It grows to 10 of the 11 blocks, of which the other one's prompt needs 6."""
    with running(one_at_a_time(tiny, num_blocks=11), below) as engine:
        first = busy(engine, num_tokens=125)
        hit = below.hit(0)
        waiting = wait_behind(engine, 0, hit)
        first.let_go()
        assert waiting.result()[0] == expected[0]
        stats = engine.stats()
    assert stats.preemptions == 0
    assert stats.ahead_dropped_blocks == LOADED
    assert hit.loads[0].cancelled
    assert len(hit.loads) == 2, "when its turn came it was loaded after all"


@pytest.mark.parametrize(
    ("limits", "ahead"),
    [
        ({}, [1, 1, 1]),
        ({"load_ahead_requests": 2}, [1, 1, 0]),
        ({"load_ahead_requests": 0}, [0, 0, 0]),
        ({"load_ahead_bytes": 0}, [0, 0, 0]),
        ({"load_ahead_bytes": (LOADED + 1) * 3 * 2 * 16 * 2 * 16 * 4}, [1, 0, 0]),
        ({"num_blocks": 2 + 2 + 2 * (LOADED + 1)}, [1, 1, 0]),
    ],
)
def test_no_more_is_loaded_ahead_than_the_limits_say_and_there_is_room_for(
    tiny: Path, below: Below, expected: list[list[int]], limits: dict[str, int], ahead: list[int]
) -> None:
    with running(one_at_a_time(tiny, **limits), below) as engine:
        first = busy(engine)
        hits = [below.hit(number) for number in range(3)]
        listeners = [wait_behind(engine, number, hit) for number, hit in enumerate(hits)]
        first.step()
        assert [hit.num_ahead for hit in hits] == ahead
        first.let_go()
        assert [listener.result()[0] for listener in listeners] == expected


def test_what_several_wait_for_is_loaded_once(tiny: Path, below: Below, expected: list[list[int]]) -> None:
    with running(one_at_a_time(tiny), below) as engine:
        first = busy(engine)
        hits = [below.hit(0) for _ in range(2)]
        listeners = [
            submit(engine, request(PROMPTS[0], NUM_TOKENS, request_id=str(number), external=hit))
            for number, hit in enumerate(hits)
        ]
        first.let_go()
        results = [listener.result() for listener in listeners]
    assert [tokens for tokens, _ in results] == [expected[0]] * 2
    assert [len(hit.loads) for hit in hits] == [1, 0]
    assert results[1][1].usage.tokens_by_tier[Tier.L1] == LOADED * 16


def test_a_load_that_cannot_begin_costs_the_request_nothing_else(
    tiny: Path, below: Below, expected: list[list[int]]
) -> None:
    class Refusing(MemoryHit):
        def load_ahead(self, first_block: int, l1_blocks: object) -> MemoryLoad:
            raise Unavailable("not now")

    with running(one_at_a_time(tiny), below) as engine:
        first = busy(engine)
        hit = Refusing(below.made[-1], 0, below.hit(0).keys)
        waiting = wait_behind(engine, 0, hit)
        first.let_go()
        assert waiting.result()[0] == expected[0]
        eventually(lambda: engine.stats().blocks_referenced == 0)
    assert hit.num_released == 1
