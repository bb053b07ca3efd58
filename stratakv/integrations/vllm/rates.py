"""Load or compute: what the scheduler's side learns of both, and what it makes of it.

A pool that delivers slower than the model computes is left alone, so that vLLM is never slower with it than without. What was not
measured for a while is tried again.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

SMOOTHING = 0.2
COMPUTED_TOKENS_MIN = 64
"""Steps with fewer tokens say more about overhead than about the rate."""
VALID_S = 60.0
"""A distance that was not read for so long is tried again: it may have been slow for a while only."""


class Distance(enum.StrEnum):
    """Where pages are loaded from."""

    NEAR = "near"
    """The memory of this host's own daemon."""
    FAR = "far"


def farthest(distances: Iterable[Distance]) -> Distance:
    """Of several loads that are waited for together."""
    return Distance.FAR if Distance.FAR in distances else Distance.NEAR


@dataclass(slots=True)
class _Rate:
    tokens_per_s: float
    measured_at: float


class Rates:
    """Tokens per second, computed and loaded; exponential means."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._computed = 0.0
        self._loaded: dict[Distance, _Rate] = {}

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step of which nothing was loaded."""
        if num_tokens >= COMPUTED_TOKENS_MIN and seconds > 0:
            rate = num_tokens / seconds
            self._computed = rate if not self._computed else self._computed + SMOOTHING * (rate - self._computed)

    def loaded(self, tokens: Mapping[Distance, int], seconds: Mapping[Distance, float]) -> None:
        """Loads that ended, by distance."""
        for distance, count in tokens.items():
            if not count or seconds.get(distance, 0.0) <= 0:
                continue
            rate = count / seconds[distance]
            known = self._known(distance)
            self._loaded[distance] = _Rate(known + SMOOTHING * (rate - known) if known else rate, self._clock())

    def is_worth_loading(self, distance: Distance) -> bool:
        """Whether loading a token takes less time than computing it, as far as is known."""
        known = self._known(distance)
        return not known or known > self._computed

    def _known(self, distance: Distance) -> float:
        rate = self._loaded.get(distance)
        return rate.tokens_per_s if rate is not None and self._clock() - rate.measured_at <= VALID_S else 0.0
