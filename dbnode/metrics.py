"""Prometheus metrics of the DB node, under the stems and buckets that vLLM's dashboards know. Never prompts or request ids."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dbnode.generate import Outcome, PromptTiers, Settled, Source

TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
    7680.0,
)  # fmt: skip
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class NodeMetrics:
    """An Observer of the inference service, and gauges that are read when scraped."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        name = "model_name"
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS_S)
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Mean gap between a request's tokens.", ITL_BUCKETS_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to the end.", LATENCY_BUCKETS_S)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting before any work.", LATENCY_BUCKETS_S)
        self._decode = self._histogram("request_decode_time_seconds", "First token to the end.", LATENCY_BUCKETS_S)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS)
        self._generated = self._histogram("request_generation_tokens", "Generated tokens of a request.", TOKEN_BUCKETS)
        self._requests = Counter(
            "stratakv_requests", "Requests that ended.", [name, "source", "outcome", "error"], registry=self.registry
        )
        self._queries = self._counter("stratakv_prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = self._counter("stratakv_prefix_cache_hits", "Prompt tokens that were not computed.")
        by_source = Counter(
            "stratakv_prompt_tokens_by_source",
            "Prompt tokens by where their KV came from.",
            [name, "source"],
            registry=self.registry,
        )
        self._by_source = {tier: by_source.labels(model, tier) for tier in PromptTiers.__struct_fields__}
        self._ended: dict[tuple[Source, Outcome, str | None], Counter] = {}
        """Counters of requests, once there was one."""
        self._running = Gauge("stratakv_num_requests_running", "Requests workers have.", [name], registry=self.registry)
        self._waiting = Gauge("stratakv_num_requests_waiting", "Requests waiting here.", [name], registry=self.registry)
        self._poison = Gauge(
            "stratakv_poison_prompts", "Prompts refused because workers died of them.", registry=self.registry
        )
        self.usage_dropped = Counter(
            "stratakv_usage_events_dropped", "Usage events lost because the database was away.", registry=self.registry
        )
        self.upkeep = UpkeepMetrics(self.registry)
        self.statements_dropped = Counter(
            "stratakv_sql_statement_stats_dropped",
            "Ends of statements left out of the statistics because the database was away.",
            registry=self.registry,
        )

    def watch_admission(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Read these two whenever metrics are scraped."""
        self._running.labels(self._model).set_function(running)
        self._waiting.labels(self._model).set_function(waiting)

    def watch_suspects(self, num_remembered: Callable[[], float]) -> None:
        """Read it whenever metrics are scraped."""
        self._poison.set_function(num_remembered)

    def first_token(self, source: Source, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def settled(self, settled: Settled) -> None:
        usage = settled.usage
        self._count_end(settled.request.source, settled.outcome, settled.error_code)
        if settled.outcome is not Outcome.COMPLETED:
            return
        decode_s = (usage.timings.e2e_ms - usage.timings.ttft_ms) / 1e3
        self._e2e.observe(usage.timings.e2e_ms / 1e3)
        self._queue.observe(usage.timings.queue_ms / 1e3)
        self._decode.observe(decode_s)
        self._prompt.observe(usage.prompt_tokens)
        self._generated.observe(usage.completion_tokens)
        if usage.completion_tokens > 1:
            self._itl.observe(decode_s / (usage.completion_tokens - 1))
        self._queries.inc(usage.prompt_tokens)
        self._hits.inc(usage.tiers.num_cached)
        for tier, counter in self._by_source.items():
            if num_tokens := getattr(usage.tiers, tier):
                counter.inc(num_tokens)

    def _count_end(self, source: Source, outcome: Outcome, error: str | None) -> None:
        counter = self._ended.get((source, outcome, error))
        if counter is None:
            counter = self._requests.labels(self._model, source.value, outcome.value, error or "")
            self._ended[source, outcome, error] = counter
        counter.inc()

    def _histogram(self, stem: str, doc: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"stratakv_{stem}", doc, ["model_name"], buckets=buckets, registry=self.registry)
        return histogram.labels(self._model)

    def _counter(self, stem: str, doc: str) -> Counter:
        return Counter(stem, doc, ["model_name"], registry=self.registry).labels(self._model)


class UpkeepMetrics:
    """Of what DB nodes do to the metadata every hour. What is made or deleted counts at the DB node that did it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.days_ahead = Gauge(
            "stratakv_usage_partitions_days_ahead", "Days that have a partition, when last looked.", registry=registry
        )
        self.partitions_made = Counter("stratakv_usage_partitions_made", "Months made ahead.", registry=registry)
        self.partitions_dropped = Counter("stratakv_usage_partitions_dropped", "Months dropped.", registry=registry)
        self.audit_deleted = Counter(
            "stratakv_audit_entries_deleted", "Old entries deleted from the log of changes.", registry=registry
        )
        self.failures = Counter("stratakv_upkeep_failures", "Rounds that failed; tried again.", registry=registry)
