"""Prometheus metrics of a daemon: what its threads count, and how memory and disk are when somebody asks.

Served at `GET /metrics` of the daemon's TCP port (`dmp.http_face`). What processes of this host do in shared memory is not seen
here, but each of their pages was granted first.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dmp.disk.store import DiskStore
from dmp.puts import PutTable
from dmp.traffic import Amount, Flow
from stratakv._native.base import Int64s
from stratakv.pool.messages import DaemonStats


class Tier(enum.StrEnum):
    """Where a page of this daemon lies."""

    MEMORY = "memory"
    DISK = "disk"


class Direction(enum.StrEnum):
    """Of a page that moves within the daemon."""

    DEMOTE = "demote"
    PROMOTE = "promote"
    COMPACT = "compact"


class DaemonMetrics:
    """All metrics of one daemon, in a registry of their own. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, doc: str, *labels: str) -> Counter:
            return Counter(f"stratakv_dmp_{name}", doc, labels, registry=self.registry)

        self._granted_pages = counter("granted_pages", "Pages of memory given to writers, over TCP or in shared memory")
        self._granted_bytes = counter("granted_bytes", "Their bytes")
        self._moved_pages = counter("moved_pages", "Pages copied between memory and disk", "direction")
        self._moved_bytes = counter("moved_bytes", "Their bytes", "direction")
        self._move_seconds = counter("move_seconds", "Time spent on copying them", "direction")
        self._unmoved_pages = counter("unmoved_pages", "Pages that could not be copied", "direction")
        self._refused_orders = counter(
            "refused_orders", "Orders to move pages for which there was no room in the queue"
        )
        self._scrubbed_pages = counter("scrubbed_pages", "Pages on disk that were read and checked in the background")
        self._scrubbed_bytes = counter("scrubbed_bytes", "Their bytes")

    def watch(
        self,
        puts: PutTable,
        store: DiskStore | None,
        stats: Callable[[], DaemonStats],
        traffic: Callable[[], Int64s],
    ) -> None:
        """Tell the state of these too, and what has been moved over TCP (`dmp.traffic`)."""
        self.registry.register(_State(puts, store, stats, traffic))

    def granted(self, num_pages: int, size_bytes: int) -> None:
        self._granted_pages.inc(num_pages)
        self._granted_bytes.inc(size_bytes)

    def moved(self, direction: Direction, num_pages: int, size_bytes: int, seconds: float) -> None:
        """Pages that were copied, whatever becomes of the copies."""
        self._moved_pages.labels(direction).inc(num_pages)
        self._moved_bytes.labels(direction).inc(size_bytes)
        self._move_seconds.labels(direction).inc(seconds)

    def not_moved(self, direction: Direction, num_pages: int) -> None:
        self._unmoved_pages.labels(direction).inc(num_pages)

    def orders_refused(self, count: int) -> None:
        self._refused_orders.inc(count)

    def scrubbed(self, size_bytes: int) -> None:
        self._scrubbed_pages.inc()
        self._scrubbed_bytes.inc(size_bytes)


class _State(Collector):
    """Gauges, read when they are asked for."""

    def __init__(
        self,
        puts: PutTable,
        store: DiskStore | None,
        stats: Callable[[], DaemonStats],
        traffic: Callable[[], Int64s],
    ) -> None:
        self._puts = puts
        self._store = store
        self._stats = stats
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        stats, store = self._stats(), self._store
        yield _gauge("connections", "Connections now", stats.connections)
        yield _gauge("open_puts", "Puts whose outcome is not known yet", stats.puts_open)
        yield _gauge("limit_bytes", "Memory that may be used, 0 for all of it", self._puts.limit_bytes)
        memory = stats.size_bytes, stats.used_bytes, stats.extents
        disk = (store.size_bytes, store.used_bytes, store.num_pages) if store is not None else None
        yield from _by_tier(memory, disk)
        yield from _moved(self._traffic(), has_disk=store is not None)
        if store is not None:
            yield _gauge(
                "disk_file_bytes", "Length of the disk's files, with what is out of use in them", store.stored_bytes
            )
            yield _gauge("disk_read_only", "1 while the disk takes no pages", float(store.is_read_only))
            yield _counter("damaged_pages", "Pages on disk that were found damaged", store.damaged_pages)
            yield _counter(
                "damaged_start_bytes", "Bytes of its files that held no whole page at the start", store.skipped_bytes
            )
            yield _counter("disk_write_failures", "Writes that the disk refused", store.write_failures)


def _by_tier(memory: tuple[int, int, int], disk: tuple[int, int, int] | None) -> Iterator[Metric]:
    size = GaugeMetricFamily("stratakv_dmp_size_bytes", "Size of a tier", labels=["tier"])
    used = GaugeMetricFamily("stratakv_dmp_used_bytes", "Bytes in use", labels=["tier"])
    free = GaugeMetricFamily("stratakv_dmp_free_bytes", "Bytes that are free", labels=["tier"])
    pages = GaugeMetricFamily("stratakv_dmp_pages", "Pages", labels=["tier"])
    for tier, state in ((Tier.MEMORY, memory), (Tier.DISK, disk)):
        if state is not None:
            size.add_metric([tier], state[0])
            used.add_metric([tier], state[1])
            free.add_metric([tier], max(0, state[0] - state[1]))
            pages.add_metric([tier], state[2])
    yield from (size, used, free, pages)


def _moved(traffic: Int64s, *, has_disk: bool) -> Iterator[Metric]:
    units = (("ranges", Amount.RANGES, 1.0), ("bytes", Amount.BYTES, 1.0), ("seconds", Amount.NANOSECONDS, 1e-9))
    documentations = {
        "read_ranges": "Ranges sent to readers over TCP",
        "read_bytes": "Their bytes",
        "read_seconds": "Time spent on sending them",
        "written_ranges": "Ranges received from writers over TCP",
        "written_bytes": "Their bytes",
        "written_seconds": "Time spent on receiving them",
    }
    for unit, amount, scale in units:
        name = f"read_{unit}"
        read = CounterMetricFamily(f"stratakv_dmp_{name}", documentations[name], labels=["tier"])
        read.add_metric([Tier.MEMORY], traffic[Flow.READ, amount] * scale)
        if has_disk:
            read.add_metric([Tier.DISK], traffic[Flow.READ_FROM_DISK, amount] * scale)
        yield read
        name = f"written_{unit}"
        yield _counter(name, documentations[name], traffic[Flow.WRITTEN, amount] * scale)


def _gauge(name: str, doc: str, value: float) -> Metric:
    return GaugeMetricFamily(f"stratakv_dmp_{name}", doc, value=value)


def _counter(name: str, doc: str, value: float) -> Metric:
    return CounterMetricFamily(f"stratakv_dmp_{name}", doc, value=value)
