"""A simulated fleet on the router's own code."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnode.simulation.caches import LruBlocks
from dbnode.simulation.report import SimReport, percentile
from dbnode.simulation.run import SimSettings, simulate
from dbnode.simulation.trace import TraceRequest
from stratakv.keys import KEY_BYTES, BlockKey
from stratakv.settings import RouterPolicy, RouterSettings

BLOCK = 512
ALL = list(RouterPolicy)


def request(at_s: float, blocks: Sequence[int], output_tokens: int = 10, rest: int = 88) -> TraceRequest:
    keys = [BlockKey(block.to_bytes(KEY_BYTES, "big")) for block in blocks]
    return TraceRequest(at_s, len(keys) * BLOCK + rest, output_tokens, keys)


def conversations(seed: int, count: int = 30) -> list[TraceRequest]:
    """Growing prompts behind two system prompts."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        blocks = [number % 2, *(1000 + number * 100 + i for i in range(rng.randint(1, 20)))]
        at_s = rng.uniform(0, 20)
        for turn in range(rng.randint(1, 4)):
            blocks = [*blocks, 100_000 + number * 100 + turn]
            requests.append(request(at_s, blocks))
            at_s += rng.uniform(1, 20)
    return sorted(requests, key=lambda r: r.at_s)


def fleet(policy: RouterPolicy = RouterPolicy.COST, seed: int = 0, **changed: float) -> SimSettings:
    router = RouterSettings(policy=policy)
    return SimSettings(workers=3, l1_blocks=100, seed=seed, router=router, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ALL)
def test_the_same_seed_gives_the_same_report(policy: RouterPolicy) -> None:
    trace = conversations(1)
    first, second = (simulate(trace, fleet(policy, seed=5)) for _ in range(2))
    assert first == second


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), policy=st.sampled_from(ALL), pool=st.sampled_from([0.0, 1e9]))
def test_every_request_is_served_once_and_no_policy_hits_more_than_there_is(
    seed: int, policy: RouterPolicy, pool: float
) -> None:
    trace = conversations(seed)
    found = simulate(trace, fleet(policy, seed, pool_bytes_per_s=pool))
    assert (found.requests, found.refused) == (len(trace), 0)
    assert 0 <= found.hit_share <= found.infinite_hit_share < 1
    assert found.pool_share == 0 or pool
    assert found.ttft_p50_s <= found.ttft_p99_s


def test_an_idle_fleet_takes_as_long_as_the_tokens_that_are_not_cached() -> None:
    found = simulate([request(0, [1, 2]), request(60, [1, 2, 3])], fleet(prefill_tokens_per_s=1000.0))
    assert found.l1_share == pytest.approx(2 * BLOCK / (5 * BLOCK + 2 * 88))
    assert found.ttft_p99_s == pytest.approx((2 * BLOCK + 88) / 1000)
    assert found.ttft_p50_s == pytest.approx((BLOCK + 88) / 1000)


def test_siblings_that_arrive_at_once_are_computed_once_where_that_is_quicker() -> None:
    """The second finds nothing told yet; what was sent a moment ago counts."""
    head = list(range(20))
    siblings = [request(0, [*head, 100 + number], rest=1) for number in range(2)]
    found = simulate(siblings, fleet(prefill_tokens_per_s=1000.0, events_lag_s=1.0))
    alone = simulate(siblings, fleet(RouterPolicy.ROUND_ROBIN, prefill_tokens_per_s=1000.0, events_lag_s=1.0))
    assert alone.hit_share == 0
    assert found.hit_share == 0  # waiting for the first one takes as long as computing it
    third = [*siblings, request(1, [*head, 200], rest=1), request(1, [*head, 201], rest=1)]
    assert simulate(third, fleet(prefill_tokens_per_s=1000.0, events_lag_s=30.0)).hit_share > 0.4


def test_a_hot_holder_does_not_get_everything() -> None:
    """One prefix that everybody has, more requests than one worker can serve."""
    trace = [request(0, list(range(40)))]
    trace += [
        request(10 + number * 0.01, [*range(40), *(1000 + number * 8 + i for i in range(8))]) for number in range(60)
    ]
    cost, prefix = (simulate(trace, fleet(policy)) for policy in (RouterPolicy.COST, RouterPolicy.PREFIX))
    assert cost.ttft_p99_s < 0.8 * prefix.ttft_p99_s


def test_with_a_pool_of_all_locality_is_worth_little() -> None:
    trace = conversations(3, count=60)
    pooled = {p: simulate(trace, fleet(p, pool_bytes_per_s=1e10)) for p in (RouterPolicy.COST, RouterPolicy.LEAST_LOAD)}
    assert pooled[RouterPolicy.COST].ttft_mean_s <= 1.02 * pooled[RouterPolicy.LEAST_LOAD].ttft_mean_s


def test_what_would_come_too_late_is_refused_before_any_work() -> None:
    trace = [request(0, range(number * 50, number * 50 + 50)) for number in range(30)]
    one_s = 50 * BLOCK / 7000
    found = simulate(trace, fleet(ttft_max_s=2.5 * one_s))
    assert found.refused == 30 - 3 * 2
    assert found.ttft_p99_s <= 2.5 * one_s


@given(st.lists(st.lists(st.integers(0, 30), max_size=12, unique=True), max_size=30), st.integers(1, 10))
def test_an_l1_holds_no_more_than_it_has_room_for(prompts: list[list[int]], room: int) -> None:
    cache, held = LruBlocks(room), set[BlockKey]()
    for blocks in prompts:
        added, left = cache.use(request(0, blocks).keys)
        held = (held | set(added)) - set(left)
        assert len(cache) == len(held) <= room


def test_percentiles_are_values_that_occurred() -> None:
    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.5, 0.51, 1.0)] == [1.0, 2.0, 3.0, 4.0]
    assert percentile([], 0.5) == 0.0
    assert SimReport.of(3, [], BLOCK).refused == 3
