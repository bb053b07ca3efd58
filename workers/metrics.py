"""Prometheus metrics of a worker: vLLM's stems under `stratakv_`, one bounded label `model_name`."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stratakv.wire import WorkerLoad
from workers.engine.connector import Tier
from workers.engine.kv_cache import KVCache
from workers.engine.requests import RequestUsage
from workers.engine.stats import EngineStats

_TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_TIME_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)


class WorkerMetrics:
    """All metrics of one worker, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        label = ["model_name"]

        def histogram(name: str, doc: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"stratakv_{name}", doc, label, registry=self.registry, buckets=buckets)

        def counter(name: str, doc: str, labels: list[str] = label) -> Counter:
            return Counter(f"stratakv_{name}", doc, labels, registry=self.registry)

        self._ttft = histogram("time_to_first_token_seconds", "Arrival at the worker to first token", _TTFT_BUCKETS)
        self._queue = histogram("request_queue_time_seconds", "Waiting for the engine", _TTFT_BUCKETS)
        self._prefill = histogram("request_prefill_time_seconds", "Prefill of a request", _TIME_BUCKETS)
        self._decode = histogram("request_decode_time_seconds", "Decode of a request", _TIME_BUCKETS)
        self._generated = counter("generation_tokens", "Tokens generated")
        self._by_source = counter(
            "prompt_tokens_by_source", "Prompt tokens by where their KV came from", [*label, "source"]
        )
        self._ended = counter("request_success", "Requests ended, by reason", [*label, "finished_reason"])
        self._running = Gauge("stratakv_num_requests_running", "Requests in the batch", label, registry=self.registry)
        self._waiting = Gauge("stratakv_num_requests_waiting", "Requests queued", label, registry=self.registry)
        self._kv_usage = Gauge(
            "stratakv_kv_cache_usage_perc", "Share of L1 in use, 0 to 1", label, registry=self.registry
        )
        tier = [*label, "tier"]
        self._decided = counter("kv_pages_found", "Pages below L1, by what was chosen", [*tier, "decision"])
        self._loaded_pages = counter("kv_loaded_pages", "Pages loaded into L1, by tier", tier)
        self._loaded_bytes = counter("kv_loaded_bytes", "Bytes loaded into L1, by tier", tier)
        self._load_seconds = counter("kv_load_seconds", "Time spent on loading, by tier", tier)
        self._written_pages = counter("kv_written_pages", "Pages written to the pool")
        self._written_bytes = counter("kv_written_bytes", "Bytes written to the pool")
        self._handovers = counter("handovers", "Prompts taken over from another worker", [*label, "outcome"])
        self._load_rate = Gauge(
            "stratakv_kv_load_bytes_per_second", "Measured bandwidth of each tier", tier, registry=self.registry
        )
        self._pool_errors = counter("pool_errors", "Loads and saves that failed, by kind", [*label, "kind"])

    def handover(self, outcome: str) -> None:
        """One hand-over to this worker has ended: `whole`, `part`, `failed` or `cancelled`."""
        self._handovers.labels(self._model, outcome).inc()

    def watch(self, l1: KVCache, num_l2_pages: Callable[[], int], page_bytes: int) -> None:
        """Tell what these hold too."""
        self.registry.register(_Caches(self._model, l1, num_l2_pages, page_bytes))

    def watch_engine(self, stats: Callable[[], EngineStats]) -> None:
        """Tell what the engine counts too."""
        self.registry.register(_EngineCounters(self._model, stats))

    def time_to_first_token(self, seconds: float) -> None:
        self._ttft.labels(self._model).observe(seconds)

    def request_ended(self, reason: str, usage: RequestUsage) -> None:
        self._queue.labels(self._model).observe(usage.queue_time_s)
        self._prefill.labels(self._model).observe(usage.prefill_time_s)
        self._decode.labels(self._model).observe(usage.decode_time_s)
        self._generated.labels(self._model).inc(usage.generated_tokens)
        self._ended.labels(self._model, reason).inc()
        for tier, num_tokens in usage.tokens_by_tier.items():
            self._by_source.labels(self._model, tier.value).inc(num_tokens)

    def load_decided(self, loaded: Iterable[Tier], recomputed: Iterable[Tier]) -> None:
        """Pages that were found, in order: those to be loaded, and those that take longer to load than to compute."""
        for decision, tiers in (("load", loaded), ("recompute", recomputed)):
            for tier, count in collections.Counter(tiers).items():
                self._decided.labels(self._model, tier.value, decision).inc(count)

    def loaded(self, tier: Tier, num_pages: int, size_bytes: int, seconds: float) -> None:
        """What is good of one load."""
        self._loaded_pages.labels(self._model, tier.value).inc(num_pages)
        self._loaded_bytes.labels(self._model, tier.value).inc(size_bytes)
        self._load_seconds.labels(self._model, tier.value).inc(seconds)

    def written(self, num_pages: int, size_bytes: int) -> None:
        """Pages that can be found now."""
        self._written_pages.labels(self._model).inc(num_pages)
        self._written_bytes.labels(self._model).inc(size_bytes)

    def pool_error(self, kind: str) -> None:
        self._pool_errors.labels(self._model, kind).inc()

    def observe_load(self, load: WorkerLoad) -> None:
        """Refresh the gauges."""
        self._running.labels(self._model).set(load.running)
        self._waiting.labels(self._model).set(load.waiting)
        for tier, rate in load.load_bytes_per_s.items():
            self._load_rate.labels(self._model, tier).set(rate)
        if load.l1_blocks_total:
            self._kv_usage.labels(self._model).set(1 - load.l1_blocks_free / load.l1_blocks_total)


class _EngineCounters(Collector):
    """What the engine had to take back and how it was made good, and what it has loaded ahead."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self._model = model
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        preempted = CounterMetricFamily(
            "stratakv_num_preemptions", "Requests that gave their blocks back for others", labels=["model_name"]
        )
        preempted.add_metric([self._model], stats.preemptions)
        recovered = CounterMetricFamily(
            "stratakv_preempted_tokens",
            "Tokens that those had computed, by where their KV came from when they went on",
            labels=["model_name", "source"],
        )
        for tier in Tier:
            recovered.add_metric([self._model, tier.value], stats.recovered_tokens[tier])
        ahead = CounterMetricFamily(
            "stratakv_kv_ahead_pages",
            "Pages loaded for requests that waited, by what became of them",
            labels=["model_name", "outcome"],
        )
        ahead.add_metric([self._model, "used"], stats.ahead_used_blocks)
        ahead.add_metric([self._model, "dropped"], stats.ahead_dropped_blocks)
        yield from (preempted, recovered, ahead)


class _Caches(Collector):
    """What L1 and L2 hold, read when it is asked for."""

    def __init__(self, model: str, l1: KVCache, num_l2_pages: Callable[[], int], page_bytes: int) -> None:
        self._model = model
        self._l1 = l1
        self._num_l2_pages = num_l2_pages
        self._page_bytes = page_bytes

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name", "tier"]
        blocks = GaugeMetricFamily("stratakv_kv_cached_blocks", "Blocks in use or cached, by tier", labels=labels)
        size = GaugeMetricFamily("stratakv_kv_cached_bytes", "Their bytes", labels=labels)
        use, num_l2 = self._l1.use, self._num_l2_pages()
        for tier, count, block_bytes in (
            (Tier.L1, use.cached + use.referenced, self._l1.block_bytes),
            (Tier.L2, num_l2, self._page_bytes),
        ):
            blocks.add_metric([self._model, tier.value], count)
            size.add_metric([self._model, tier.value], count * block_bytes)
        evicted = CounterMetricFamily(
            "stratakv_kv_evicted_blocks", "Cached blocks that L1 gave up for others", labels=labels
        )
        evicted.add_metric([self._model, Tier.L1.value], self._l1.num_evicted)
        ages = CounterMetricFamily(
            "stratakv_kv_evicted_age_seconds", "Sum of the times for which those had not been used", labels=labels
        )
        ages.add_metric([self._model, Tier.L1.value], self._l1.evicted_age_s)
        yield from (blocks, size, evicted, ages)
