"""Prometheus metrics of the workers as the router sees them, read whenever somebody scrapes. Registered by `dbnode.node`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dbnode.kv_events.feed import FeedState, FeedStatus
from dbnode.scheduler.workers import WorkerDirectory

_COUNTERS = (
    ("batches", "Batches of KV events taken in."),
    ("gaps", "How often events were missing."),
    ("restarts", "How often a publisher began anew."),
    ("resyncs", "How often all that a worker had told was forgotten."),
)


class RouterMetrics(Collector):
    """By `worker`, which is its URL."""

    def __init__(self, directory: WorkerDirectory) -> None:
        self._directory = directory

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked for when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        alive = _gauge("worker_alive", "1 while it takes requests.")
        blocks = _gauge("index_blocks", "Blocks that a worker is believed to hold.")
        live = _gauge("events_live", "1 while the router goes by a worker's KV events.")
        counters = [
            CounterMetricFamily(f"stratakv_router_event_{name}", doc, labels=["worker"]) for name, doc in _COUNTERS
        ]
        for record in self._directory.records:
            alive.add_metric([record.url], record.alive)
            blocks.add_metric([record.url], len(record.index))
            if record.events is not None:
                live.add_metric([record.url], record.events.state is FeedState.LIVE)
                _count([record.url], record.events, counters)
        yield from (alive, blocks, live, *counters)


def _count(labels: list[str], status: FeedStatus, counters: Iterable[CounterMetricFamily]) -> None:
    values = (status.batches, status.gaps, status.restarts, status.resyncs)
    for counter, value in zip(counters, values, strict=True):
        counter.add_metric(labels, value)


def _gauge(name: str, doc: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"stratakv_router_{name}", doc, labels=["worker"])
