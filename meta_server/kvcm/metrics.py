"""Metrics of the KVCM API: how long its calls take and how they end, for Prometheus and for GetMetrics."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter

from meta_server.call_times import CallTimes


class Metrics:
    """Of all services of one meta server, in a registry of their own, which shows the native protocol's calls, too."""

    def __init__(self, native: CallTimes, *, slow_s: float) -> None:
        self.registry = CollectorRegistry()
        self.native = native
        self.calls = CallTimes("stratakv_kvcm_call_seconds", "api_name", slow_s=slow_s, clock=time.monotonic)
        self.registry.register(self.calls)
        self.registry.register(native)
        self._results = Counter(
            "stratakv_kvcm_calls", "Calls by the code of their answer.", ["api_name", "code"], registry=self.registry
        )

    def count(self, api_name: str, code: str, seconds: float) -> None:
        self.calls.observe(api_name, seconds)
        self._results.labels(api_name, code).inc()
