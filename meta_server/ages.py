"""What time it was when the index had reached a tick: pages are stamped with ticks only.

Sampled by `rules`; asked by it, and by `reclaim` for the age of what it removes.
"""

from __future__ import annotations

import bisect
from collections import deque

from meta_server.presence import Clock

TIMES_MAX = 65_536
SAMPLE_S = 10.0
"""How finely the age of a page is known; with TIMES_MAX, for a week."""


class Ages:
    """Samples of (time, tick), oldest first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque(maxlen=TIMES_MAX)

    def sample(self, tick: int) -> None:
        """The index has reached this tick now; taken every SAMPLE_S."""
        now = self._clock()
        if not self._samples or now - self._samples[-1][0] >= SAMPLE_S:
            self._samples.append((now, tick))

    def tick_before(self, age_s: float) -> int | None:
        """What was last asked for up to this tick has that age; None if nothing is known to have it."""
        at = bisect.bisect_right(self._samples, self._clock() - age_s, key=lambda sample: sample[0])
        return self._samples[at - 1][1] if at else None

    def age_s(self, tick: int) -> float:
        """How long ago this tick was at least."""
        at = bisect.bisect_left(self._samples, tick, key=lambda sample: sample[1])
        return self._clock() - self._samples[at][0] if at < len(self._samples) else 0.0
