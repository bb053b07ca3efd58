"""Prometheus metrics of the pool as the meta server knows it, on a port of their own (`meta.metrics_port`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meta_server.call_times import CallTimes
from meta_server.counts import AGE_BOUNDS_S, PoolCounts, Tier, tier_of
from meta_server.elector import Elector
from meta_server.handlers import Handlers
from meta_server.nodes import Node
from stratakv.wire import GetStats, ListOwners, OwnerState, Stats

OWNERS_SHOWN_MAX = 100
"""Owners with series of their own: those with most; the others are one together."""
OTHERS = "(others)"


def metrics_app(elector: Elector, leading: Callable[[], Handlers | None], call_times: CallTimes) -> Starlette:
    """`GET /metrics`; of the pool only while this meta server leads.

    It runs on the server's event loop, so that the figures of one answer belong together.
    """
    registry = CollectorRegistry()
    registry.register(PoolCollector(leading))
    registry.register(LeaderCollector(elector))
    registry.register(call_times)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[Route("/metrics", metrics)])


class PoolCollector(Collector):
    """Everything is read when it is asked for."""

    def __init__(self, leading: Callable[[], Handlers | None]) -> None:
        self._leading = leading

    def collect(self) -> Iterator[Metric]:
        handlers = self._leading()
        if handlers is not None:
            yield from _totals(handlers.stats(GetStats()))
            yield from _segments([node for node in handlers.nodes if node.reachable])
            yield from _pages(handlers.counts)
            yield from _owners(handlers.owners.states(ListOwners()).owners)


class LeaderCollector(Collector):
    """This meta server's part in the election."""

    def __init__(self, elector: Elector) -> None:
        self._elector = elector

    def collect(self) -> Iterator[Metric]:
        elector = self._elector
        yield GaugeMetricFamily("stratakv_meta_is_leader", "1 for the meta server that leads", elector.is_leader)
        yield GaugeMetricFamily("stratakv_meta_term", "Term of the leader; 0 for one that stands by", elector.term)
        yield CounterMetricFamily(
            "stratakv_meta_take_overs", "How often this meta server has begun to lead", elector.take_overs
        )


def _totals(stats: Stats) -> Iterator[Metric]:
    yield _gauge("pending_puts", "Puts in progress", stats.puts_pending)
    yield _gauge("leases", "Read leases now", stats.leases)
    yield _gauge("pins", "Pinned prefixes now", stats.pins)
    yield _gauge("workers", "Workers that report", stats.workers)
    yield _counter("lookups", "Lookups of a prefix", stats.lookups)
    yield _counter("lookup_hits", "Those that found at least one block", stats.lookup_hits)
    yield _counter("demoted_pages", "Pages that went from memory to disk", stats.demoted)
    yield _counter("promoted_pages", "Pages that came back from disk", stats.promoted)
    yield _gauge("replicas", "Pages whose blocks lie at another daemon first, now", stats.replicas)
    yield _gauge("replica_bytes", "Their bytes", stats.replica_bytes)
    yield _counter("replicas_made", "Pages copied because they are hot", stats.replicas_made)
    yield _counter("replicas_removed", "Copies that were removed", stats.replicas_removed)
    yield _counter("replicas_promoted", "Copies that took the stead of a lost page", stats.replicas_promoted)
    yield _counter("replica_reads", "Pages that readers were told of at a copy", stats.replica_reads)


def _segments(nodes: Iterable[Node]) -> Iterator[Metric]:
    """Of those whose daemons report."""
    labels = ["node", "tier"]
    families = {
        name: GaugeMetricFamily(f"stratakv_pool_segment_{name}", doc, labels=labels)
        for name, doc in (
            ("size_bytes", "Size of a segment"),
            ("used_bytes", "Bytes in use"),
            ("free_bytes", "Bytes that are free"),
            ("committed_bytes", "Bytes of pages that can be found"),
            ("pages", "Pages that can be found"),
            ("read_only", "1 while it takes no pages"),
            ("draining", "1 while its pages leave it"),
        )
    }
    for node in nodes:
        values = (
            node.segment.size_bytes,
            node.used_bytes,
            node.free_bytes,
            node.committed_bytes,
            node.committed_pages,
            node.read_only,
            node.is_draining,
        )
        for family, value in zip(families.values(), values, strict=True):
            family.add_metric([node.segment.node, tier_of(node)], float(value))
    yield from families.values()


def _pages(counts: PoolCounts) -> Iterator[Metric]:
    yield _counter("asked_pages", "Pages that readers asked for", counts.asked)
    found = CounterMetricFamily("stratakv_pool_found_pages", "Pages that they were told of", labels=["tier"])
    for tier in Tier:
        found.add_metric([tier], counts.found[tier])
    yield found
    for name, doc, values in (
        ("removed_pages", "Pages that left the pool or their place", counts.removed),
        ("removed_bytes", "Their bytes", counts.removed_bytes),
    ):
        family = CounterMetricFamily(f"stratakv_pool_{name}", doc, labels=["tier", "reason"])
        for (tier, reason), value in sorted(values.items()):
            family.add_metric([tier, reason], value)
        yield family
    ages = HistogramMetricFamily(
        "stratakv_pool_evicted_age_seconds", "Time since pages evicted for room had been asked for", labels=["tier"]
    )
    for tier, histogram in sorted(counts.evicted_ages.items()):
        bounds = ["+Inf" if bound == AGE_BOUNDS_S[-1] else str(bound) for bound in AGE_BOUNDS_S]
        up_to = [round(count) for count in itertools.accumulate(histogram.counts)]
        ages.add_metric([tier], list(zip(bounds, up_to, strict=True)), histogram.sum_s)
    yield ages


def _owners(owners: Sequence[OwnerState]) -> Iterator[Metric]:
    labels = ["tenant", "tier"]
    used = GaugeMetricFamily("stratakv_pool_tenant_bytes", "Bytes of a tenant's pages", labels=labels)
    limits = GaugeMetricFamily("stratakv_pool_tenant_limit_bytes", "What they may be, where limited", labels=labels)
    by_size = sorted(owners, key=lambda state: -(state.memory_bytes + state.disk_bytes))
    for state in by_size[:OWNERS_SHOWN_MAX]:
        used.add_metric([state.limit.name, Tier.MEMORY], state.memory_bytes)
        used.add_metric([state.limit.name, Tier.DISK], state.disk_bytes)
        for tier, limit in ((Tier.MEMORY, state.limit.memory_bytes_max), (Tier.DISK, state.limit.disk_bytes_max)):
            if limit is not None:
                limits.add_metric([state.limit.name, tier], limit)
    if rest := by_size[OWNERS_SHOWN_MAX:]:
        used.add_metric([OTHERS, Tier.MEMORY], sum(state.memory_bytes for state in rest))
        used.add_metric([OTHERS, Tier.DISK], sum(state.disk_bytes for state in rest))
    yield from (used, limits)


def _gauge(name: str, doc: str, value: float) -> Metric:
    return GaugeMetricFamily(f"stratakv_pool_{name}", doc, value=value)


def _counter(name: str, doc: str, value: float) -> Metric:
    return CounterMetricFamily(f"stratakv_pool_{name}", doc, value=value)
