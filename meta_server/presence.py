"""Who is alive: heartbeats of daemons and workers, and which of their epochs are over.

A frozen process that wakes up after a successor of the same name has registered finds its epoch retired (fencing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from stratakv.pool.meta_errors import StaleEpoch

HEARTBEATS_MISSED_MAX = 3
RETIRED_MAX = 10_000
"""Retired epochs remembered; more than that many restarts ago, nobody sleeps."""

Clock = Callable[[], float]
"""Monotonic seconds."""


class Pulse:
    """When a sender was last heard of."""

    def __init__(self, clock: Clock, heartbeat_s: float) -> None:
        self._clock = clock
        self._limit_s = heartbeat_s * HEARTBEATS_MISSED_MAX
        self._heard_at: float | None = None
        self._began_at = clock()

    def beat(self) -> None:
        self._heard_at = self._clock()

    @property
    def alive(self) -> bool:
        return self._heard_at is not None and self._clock() - self._heard_at <= self._limit_s

    @property
    def silent_s(self) -> float:
        """Since it was last heard of, or known at all."""
        return self._clock() - (self._began_at if self._heard_at is None else self._heard_at)


class RetiredEpochs:
    """Epochs that a newer registration of the same name has ended, the latest RETIRED_MAX of them."""

    def __init__(self, epochs: Iterable[bytes] = ()) -> None:
        self._epochs = dict.fromkeys(epochs)

    def add(self, epoch: bytes) -> None:
        self._epochs[epoch] = None
        if len(self._epochs) > RETIRED_MAX:
            del self._epochs[next(iter(self._epochs))]

    def refuse(self, name: str, epoch: bytes) -> None:
        """Raises StaleEpoch if `epoch` is over."""
        if epoch in self._epochs:
            raise StaleEpoch(f"{name}: this epoch is over, a newer start has registered")
