"""How long calls take: a histogram for each kind of call, and a line in the log for each one that is slow.

One for the native protocol (`door`), one for the KVCM API; read by Prometheus and by `GetMetrics`. Costs about a microsecond a
call.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from meta_server.presence import Clock
from stratakv.log import EventLogger

BOUNDS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    math.inf,
)
SLOW_LOG_INTERVAL_S = 1.0
"""One line in so long for each kind of call; the next one says how many were left out."""
_log = EventLogger("meta_server.calls")


@dataclass(slots=True)
class _Times:
    counts: list[int] = field(default_factory=lambda: [0] * len(BOUNDS_S))
    """By BOUNDS_S, not cumulative."""
    sum_s: float = 0.0
    logged_at: float = -math.inf
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class CallSummary:
    """Of one kind of call, since the start."""

    name: str
    count: int
    mean_s: float
    p50_s: float
    p99_s: float


class CallTimes(Collector):
    """By name of call."""

    def __init__(self, metric: str, label: str, *, slow_s: float, clock: Clock) -> None:
        """Calls that take `slow_s` or longer are logged; 0: none is."""
        self._metric = metric
        self._label = label
        self._slow_s = slow_s or math.inf
        self._clock = clock
        self._by_name: dict[str, _Times] = {}

    def observe(self, name: str, seconds: float) -> None:
        times = self._by_name.get(name)
        if times is None:
            times = self._by_name[name] = _Times()
        times.counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        times.sum_s += seconds
        if seconds >= self._slow_s:
            self._log_slow(name, times, seconds)

    def summaries(self) -> Iterator[CallSummary]:
        """Of all calls that there were; percentiles are read off the histograms."""
        for name, times in sorted(self._by_name.items()):
            count = sum(times.counts)
            yield CallSummary(
                name, count, times.sum_s / count, _quantile(times.counts, 0.5), _quantile(times.counts, 0.99)
            )

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            self._metric, "Time of a call, from its message to its answer", labels=[self._label]
        )
        bounds = [*map(str, BOUNDS_S[:-1]), "+Inf"]
        for name, times in sorted(self._by_name.items()):
            up_to = itertools.accumulate(times.counts)
            family.add_metric([name], list(zip(bounds, up_to, strict=True)), times.sum_s)
        yield family

    def _log_slow(self, name: str, times: _Times, seconds: float) -> None:
        now = self._clock()
        if now - times.logged_at < SLOW_LOG_INTERVAL_S:
            times.left_out += 1
            return
        _log.warning("slow_call", call=name, ms=round(seconds * 1e3, 1), left_out=times.left_out)
        times.logged_at, times.left_out = now, 0


def _quantile(counts: list[int], share: float) -> float:
    """Within the interval that it falls into, as if that were filled evenly."""
    rank, before, low = share * sum(counts), 0, 0.0
    for count, high in zip(counts, BOUNDS_S, strict=True):
        if count and before + count >= rank:
            return low if math.isinf(high) else low + (high - low) * (rank - before) / count
        before, low = before + count, high
    return low
