"""Load or compute, with the rates of a 70B model on an H100: 320 KiB of KV a token, prefill of 6,500 tokens a second.

What a tier must deliver to be worth loading from is 320 KiB × 6,500 / s = 2.13 GB/s.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratakv.worker_profile import PrefillPoint, WorkerProfile
from workers.engine.connector import Tier
from workers.engine.requests import RequestUsage
from workers.rates import LOAD_RATE_VALID_S, Rates, Stretch, pages_worth_loading

PAGE_TOKENS = 16
TOKEN_BYTES = 2 * 8 * 128 * 80 * 2
"""K and V, 8 heads of 128, 80 layers, bf16."""
PAGE_BYTES = PAGE_TOKENS * TOKEN_BYTES
PREFILL_TOKENS_PER_S = 6_500.0
PREFIX_PAGES = 200_000 // PAGE_TOKENS
GB = 1e9


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rates_of(clock: Clock | None = None, **gb_per_s: float) -> Rates:
    """What a worker knows after one prefill and one load from each tier."""
    rates = Rates(clock or Clock())
    prompt_tokens = 3_000
    rates.observe(usage_of(prompt_tokens, prompt_tokens / PREFILL_TOKENS_PER_S))
    for tier, rate in gb_per_s.items():
        rates.observe_load(Tier(tier), PAGE_BYTES, PAGE_BYTES / (rate * GB))
    return rates


def choice(rates: Rates, **pages: int) -> int:
    stretches = [Stretch(Tier(tier), count) for tier, count in pages.items()]
    return rates.pages_worth_loading(stretches, PAGE_BYTES, PAGE_TOKENS)


@pytest.mark.parametrize(
    ("gb_per_s", "is_loaded"), [(0.5, False), (1.0, False), (2.0, False), (2.1, False), (2.2, True), (25.0, True)]
)
def test_a_tier_is_used_from_the_bandwidth_on_at_which_computing_takes_longer(gb_per_s: float, is_loaded: bool) -> None:
    assert choice(rates_of(pool=gb_per_s), pool=PREFIX_PAGES) == (PREFIX_PAGES if is_loaded else 0)


def test_what_lies_in_fast_tiers_is_loaded_and_the_slow_end_is_computed() -> None:
    rates = rates_of(l2=50.0, pool=12.0, disk=1.5)
    assert choice(rates, l2=100, pool=200, disk=300) == 300
    assert choice(rates, l2=100, disk=300) == 100
    assert choice(rates, disk=300) == 0


def test_a_slow_tier_in_the_way_of_a_fast_one_is_used_if_that_makes_up_for_it() -> None:
    rates = rates_of(l2=50.0, pool=12.0, disk=1.5)
    assert choice(rates, l2=10, disk=10, pool=200) == 220
    assert choice(rates, l2=10, disk=200, pool=10) == 10


def test_a_tier_of_unknown_bandwidth_is_tried() -> None:
    assert choice(rates_of(pool=0.1), disk=5, pool=1) == 5
    assert choice(Rates(Clock()), pool=5, disk=5) == 10


def test_a_tier_that_was_slow_is_tried_again_after_a_while() -> None:
    clock = Clock()
    rates = rates_of(clock, disk=0.5)
    clock.now = LOAD_RATE_VALID_S
    assert choice(rates, disk=10) == 0
    clock.now = LOAD_RATE_VALID_S + 1
    assert choice(rates, disk=10) == 10
    rates.observe_load(Tier.DISK, PAGE_BYTES, PAGE_BYTES / (5 * GB))
    assert choice(rates, disk=10) == 10
    assert rates.load_bytes_per_s()["disk"] == pytest.approx(5 * GB)


@given(
    st.lists(st.tuples(st.sampled_from([Tier.L2, Tier.POOL, Tier.DISK]), st.integers(1, 100)), max_size=6),
    st.dictionaries(st.sampled_from([Tier.L2, Tier.POOL, Tier.DISK]), st.integers(1, 50)),
    st.integers(1, 50),
)
def test_no_other_number_of_pages_takes_less_time(
    runs: list[tuple[Tier, int]], load_page_s: dict[Tier, int], compute_page_s: int
) -> None:
    costs = [load_page_s.get(tier, 0) for tier, count in runs for _ in range(count)]
    times = [
        loading + compute_page_s * (len(costs) - count)
        for count, loading in enumerate(itertools.accumulate(costs, initial=0))
    ]
    chosen = pages_worth_loading(
        [Stretch(*run) for run in runs],
        dict(load_page_s),
        lambda num_loaded: compute_page_s * (len(costs) - num_loaded),
    )
    assert times[chosen] == min(times)


def profiled(**gb_per_s: float) -> Rates:
    """A worker that computes 1,000 tokens a second, and every pair of a new and a cached token in 1 µs more."""
    rates = Rates(Clock())
    points = (
        PrefillPoint(16, 0, 0.016),
        PrefillPoint(500, 0, 0.5),
        PrefillPoint(1000, 0, 1.0),
        PrefillPoint(100, 1000, 0.2),
    )
    rates.use_profile(WorkerProfile(points, (), {tier: rate * GB for tier, rate in gb_per_s.items()}))
    return rates


def test_a_profile_says_what_is_behind_a_long_prefix() -> None:
    page_s = PAGE_TOKENS / 1000
    slow = PAGE_BYTES / GB / (2 * page_s)
    rates = profiled(pool=slow)
    few = rates.pages_worth_loading([Stretch(Tier.POOL, 10)], PAGE_BYTES, PAGE_TOKENS)
    behind_many = rates.pages_worth_loading([Stretch(Tier.POOL, 10)], PAGE_BYTES, PAGE_TOKENS, first_page=200)
    assert (few, behind_many) == (0, 10)


def test_a_worker_that_is_slower_than_its_profile_loads_more() -> None:
    rates = profiled(pool=PAGE_BYTES / GB / 0.02)
    assert choice(rates, pool=20) == 0
    for _ in range(20):
        rates.observe(usage_of(1000, prefill_s=2.0))
    assert rates.slowdown == pytest.approx(2.0, rel=0.05)
    assert choice(rates, pool=20) == 20


def usage_of(prompt_tokens: int, prefill_s: float) -> RequestUsage:
    return RequestUsage(
        prompt_tokens=prompt_tokens,
        generated_tokens=1,
        tokens_by_tier={Tier.COMPUTED: prompt_tokens},
        preemptions=0,
        queue_time_s=0.0,
        prefill_time_s=prefill_s,
        decode_time_s=0.0,
    )
