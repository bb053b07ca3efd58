"""Rates that this worker measures of itself, and what it makes of them: load or compute.

The router reads them too. Where there is a profile, its curves say what computing takes, and requests as they end how much
slower the worker is now. Each rate is an exponential mean; safe to update from several threads, since a lost update costs one
observation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stratakv.worker_profile import Curves, WorkerProfile
from workers.engine.connector import Tier
from workers.engine.requests import RequestUsage

SMOOTHING = 0.2
PREFILL_TOKENS_MIN = 64
"""Shorter prefills say more about overhead than about the rate."""
LOAD_RATE_VALID_S = 60.0
"""A tier that was not read for so long is tried again: it may have been slow for a while only."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive pages of a prefix that lie in one tier."""

    tier: Tier
    num_pages: int


def pages_worth_loading(
    stretches: Sequence[Stretch], load_page_s: Mapping[Tier, float], rest_s: Callable[[int], float]
) -> int:
    """How many leading pages to load, so that loading them and computing the rest takes least time.

    `rest_s(n)` is what computing takes after n pages. A page can be loaded only if all before it are. So a tier that is slower than
    computing is not used, unless what it is in the way of makes up for it. What is not known counts as nothing: tiers that were
    never measured are tried.
    """
    worth = num_pages = 0
    load_s, least_s = 0.0, rest_s(0)
    is_unknown = least_s == 0.0
    for stretch in stretches:
        num_pages += stretch.num_pages
        load_s += stretch.num_pages * load_page_s.get(stretch.tier, 0.0)
        total_s = load_s + rest_s(num_pages)
        if total_s < least_s or is_unknown:
            worth, least_s = num_pages, total_s
    return worth


def _mean(old: float, new: float) -> float:
    return new if old == 0 else old + SMOOTHING * (new - old)


@dataclass(frozen=True, slots=True)
class _LoadRate:
    bytes_per_s: float
    measured_at: float


class Rates:
    """Tokens per second of prefill, seconds per decode step, bytes per second of each tier; 0 while not measured."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self.slowdown = 1.0
        """How much longer prefills take now than the profile says."""
        self.profile = WorkerProfile()
        self._curves = Curves(self.profile)
        self._clock = clock
        self._load_rates: dict[Tier, _LoadRate] = {}

    def use_profile(self, profile: WorkerProfile) -> None:
        """Begin with what was measured at the start, now or earlier."""
        self.profile, self._curves = profile, Curves(profile)
        for tier, rate in profile.load_bytes_per_s.items():
            self._load_rates.setdefault(Tier(tier), _LoadRate(rate, self._clock()))

    def observe(self, usage: RequestUsage) -> None:
        """Learn from one finished request."""
        computed = usage.tokens_by_tier.get(Tier.COMPUTED, 0)
        if computed >= PREFILL_TOKENS_MIN and computed == usage.prompt_tokens and usage.prefill_time_s > 0:
            self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, computed / usage.prefill_time_s)
            expected_s = self._curves.prefill_s(computed)
            if expected_s:
                self.slowdown = _mean(self.slowdown, usage.prefill_time_s / expected_s)
        if usage.generated_tokens > 1 and usage.decode_time_s > 0:
            self.decode_step_s = _mean(self.decode_step_s, usage.decode_time_s / (usage.generated_tokens - 1))

    def observe_load(self, tier: Tier, size_bytes: int, seconds: float) -> None:
        """Learn from one finished load."""
        if seconds <= 0 or size_bytes <= 0:
            return
        known = self._valid_load_rates().get(tier, 0.0)
        self._load_rates[tier] = _LoadRate(_mean(known, size_bytes / seconds), self._clock())

    def prefill_s(self, num_tokens: int) -> float:
        """Expected time to compute so many tokens among others; 0 while not measured."""
        return num_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0

    def rest_s(self, num_tokens: int, num_cached: int) -> float:
        """Expected time to compute the last so many tokens of a prompt; 0 while not measured."""
        return self._curves.prefill_s(num_tokens, num_cached) * self.slowdown or self.prefill_s(num_tokens)

    def load_bytes_per_s(self) -> dict[str, float]:
        """By tier, the last that was measured."""
        return {tier.value: rate.bytes_per_s for tier, rate in self._load_rates.items()}

    def pages_worth_loading(
        self, stretches: Sequence[Stretch], page_bytes: int, page_tokens: int, first_page: int = 0, num_pages: int = 0
    ) -> int:
        """The choice for these pages of a prompt of `num_pages`, from its `first_page` on, by the rates as they are now."""
        load_page_s = {tier: page_bytes / rate for tier, rate in self._valid_load_rates().items()}
        num_pages = max(num_pages, first_page + sum(stretch.num_pages for stretch in stretches))

        def rest_s(num_loaded: int) -> float:
            num_cached = first_page + num_loaded
            return self.rest_s((num_pages - num_cached) * page_tokens, num_cached * page_tokens)

        return pages_worth_loading(stretches, load_page_s, rest_s)

    def _valid_load_rates(self) -> dict[Tier, float]:
        oldest = self._clock() - LOAD_RATE_VALID_S
        return {tier: rate.bytes_per_s for tier, rate in self._load_rates.items() if rate.measured_at >= oldest}
