"""Rates that this worker measures of itself, and what it makes of them: load or compute.

The router reads the rates too. Each is an exponential mean; safe to update from several threads, since a lost update costs
one observation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


def pages_worth_loading(stretches: Sequence[Stretch], load_page_s: Mapping[Tier, float], compute_page_s: float) -> int:
    """How many leading pages to load, so that loading them and computing the others takes least time.

    A page can be loaded only if all before it are. So a tier that is slower than computing is not used, unless what it is
    in the way of makes up for it. What is not known counts as nothing: tiers that were never measured are tried.
    """
    worth = num_pages = 0
    saved_s = most_s = 0.0
    for stretch in stretches:
        num_pages += stretch.num_pages
        saved_s += stretch.num_pages * (compute_page_s - load_page_s.get(stretch.tier, 0.0))
        if saved_s > most_s or compute_page_s == 0.0:
            worth, most_s = num_pages, saved_s
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
        self._clock = clock
        self._load_rates: dict[Tier, _LoadRate] = {}

    def observe(self, usage: RequestUsage) -> None:
        """Learn from one finished request."""
        computed = usage.tokens_by_tier.get(Tier.COMPUTED, 0)
        if computed >= PREFILL_TOKENS_MIN and computed == usage.prompt_tokens and usage.prefill_time_s > 0:
            self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, computed / usage.prefill_time_s)
        if usage.generated_tokens > 1 and usage.decode_time_s > 0:
            self.decode_step_s = _mean(self.decode_step_s, usage.decode_time_s / (usage.generated_tokens - 1))

    def observe_load(self, tier: Tier, size_bytes: int, seconds: float) -> None:
        """Learn from one finished load."""
        if seconds <= 0 or size_bytes <= 0:
            return
        known = self._valid_load_rates().get(tier, 0.0)
        self._load_rates[tier] = _LoadRate(_mean(known, size_bytes / seconds), self._clock())

    def prefill_s(self, num_tokens: int) -> float:
        """Expected time to compute so many tokens; 0 while not measured."""
        return num_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0

    def load_bytes_per_s(self) -> dict[str, float]:
        """By tier, the last that was measured."""
        return {tier.value: rate.bytes_per_s for tier, rate in self._load_rates.items()}

    def pages_worth_loading(self, stretches: Sequence[Stretch], page_bytes: int, page_tokens: int) -> int:
        """The choice for these pages, by the rates as they are now."""
        load_page_s = {tier: page_bytes / rate for tier, rate in self._valid_load_rates().items()}
        return pages_worth_loading(stretches, load_page_s, self.prefill_s(page_tokens))

    def _valid_load_rates(self) -> dict[Tier, float]:
        oldest = self._clock() - LOAD_RATE_VALID_S
        return {tier: rate.bytes_per_s for tier, rate in self._load_rates.items() if rate.measured_at >= oldest}
