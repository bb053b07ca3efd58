"""Rates that this worker measures of itself; the router and the load-or-recompute choice read them.

Each is an exponential mean; safe to update from several threads, since a lost update costs one observation.
"""

from __future__ import annotations

from workers.engine.connector import Tier
from workers.engine.requests import RequestUsage

SMOOTHING = 0.2
PREFILL_TOKENS_MIN = 64
"""Shorter prefills say more about overhead than about the rate."""


def _mean(old: float, new: float) -> float:
    return new if old == 0 else old + SMOOTHING * (new - old)


class Rates:
    """Tokens per second of prefill, seconds per decode step, bytes per second of each tier; 0 while not measured."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self._load_bytes_per_s: dict[Tier, float] = {}

    def observe(self, usage: RequestUsage) -> None:
        """Learn from one finished request."""
        computed = usage.tokens_by_tier.get(Tier.COMPUTED, 0)
        if computed >= PREFILL_TOKENS_MIN and computed == usage.prompt_tokens and usage.prefill_time_s > 0:
            self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, computed / usage.prefill_time_s)
        if usage.generated_tokens > 1 and usage.decode_time_s > 0:
            self.decode_step_s = _mean(self.decode_step_s, usage.decode_time_s / (usage.generated_tokens - 1))

    def observe_load(self, tier: Tier, size_bytes: int, seconds: float) -> None:
        """Learn from one finished load."""
        if seconds > 0:
            self._load_bytes_per_s[tier] = _mean(self._load_bytes_per_s.get(tier, 0.0), size_bytes / seconds)

    def prefill_s(self, num_tokens: int) -> float:
        """Expected time to compute so many tokens; 0 while not measured."""
        return num_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0

    def load_bytes_per_s(self) -> dict[str, float]:
        return {tier.value: rate for tier, rate in self._load_bytes_per_s.items()}

    def worth_loading(self, tier: Tier, size_bytes: int, num_tokens: int) -> bool:
        """Whether loading is expected to be faster than computing; unmeasured tiers are tried."""
        rate = self._load_bytes_per_s.get(tier, 0.0)
        if rate == 0.0 or self.prefill_tokens_per_s == 0.0:
            return True
        return size_bytes / rate < num_tokens / self.prefill_tokens_per_s
