"""Keeps room on every segment: above the high water mark the coldest pages nobody reads go, down to the low one."""

from __future__ import annotations

import numpy as np

from meta_server.ages import Ages
from meta_server.catalog import Catalog
from meta_server.nodes import Node
from meta_server.presence import Clock
from stratakv.log import EventLogger
from stratakv.wire import Extent

PAGES_MAX = 16_384
"""Reclaimed in one go, so that lookups do not wait; the next tick goes on."""
_log = EventLogger("meta_server.reclaim")


class Reclaimer:
    """Called now and then for every node, and at once when a put finds no room."""

    def __init__(self, catalog: Catalog, clock: Clock, ages: Ages, *, high: float, low: float) -> None:
        self._catalog = catalog
        self._clock = clock
        self._ages = ages
        self._high = high
        self._low = low
        self.evictions = 0
        self.evicted_age_s = 0.0
        """Median time since the pages that were reclaimed last had been asked for."""

    def orders(self, node: Node) -> list[Extent]:
        """What the node's daemon shall free now."""
        return node.orders() if self._clock() >= node.free_from else []

    def check(self, node: Node) -> None:
        """Reclaim if the segment is above the high water mark."""
        if node.limit_bytes and node.moving:
            return  # what a limit has made too much goes to the disk, as long as that takes it
        # What is on its way to the disk is leaving too; a put that finds no room does not wait for that.
        if node.staying_bytes - node.moving_bytes > self._high * node.capacity_bytes:
            self.make_room(node, 0)

    def make_room(self, node: Node, size_bytes: int) -> None:
        """Order cold pages free, so that `size_bytes` fit and the segment is down to the low water mark."""
        if not node.reachable or self._clock() < node.free_from:
            return
        size = node.capacity_bytes
        target = min(int(self._low * size), size - min(size_bytes, size))
        excess = node.staying_bytes - target
        slots = self._catalog.index.coldest(node.index, excess)[:PAGES_MAX]
        if len(slots):
            self.evicted_age_s = self._ages.age_s(int(np.median(self._catalog.index.slot_ticks(slots))))
            self.evictions += self._catalog.remove(slots, "evicted")
            _log.debug("pages_evicted", node=node.segment.node, pages=len(slots))
