"""Metrics of the KVCM API: a histogram of every call's time, for Prometheus and for GetMetrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.registry import Collector

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """Of all services of one meta server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "stratakv_kvcm_call_seconds",
            "Time of a call, from its message to its answer.",
            ["api_name"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._results = Counter(
            "stratakv_kvcm_calls", "Calls by the code of their answer.", ["api_name", "code"], registry=self.registry
        )

    def count(self, api_name: str, code: str, seconds: float) -> None:
        self._seconds.labels(api_name).observe(seconds)
        self._results.labels(api_name, code).inc()

    def register(self, collector: Collector) -> None:
        """Gauges of the state."""
        self.registry.register(collector)

    def calls(self) -> Iterator[tuple[str, int, float]]:
        """Of each call that was made: its name, how often, its mean time in µs."""
        counts, sums = dict[str, float](), dict[str, float]()
        for metric in self._seconds.collect():
            for sample in metric.samples:
                if sample.name.endswith("_count"):
                    counts[sample.labels["api_name"]] = sample.value
                elif sample.name.endswith("_sum"):
                    sums[sample.labels["api_name"]] = sample.value
        for name, count in sorted(counts.items()):
            yield name, int(count), sums[name] / count * 1e6
