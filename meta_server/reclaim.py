"""Keeps room on every segment: above the high water mark the coldest pages nobody reads go, down to the low one."""

from __future__ import annotations

import numpy as np

from meta_server.ages import Ages
from meta_server.catalog import Catalog
from meta_server.counts import tier_of
from meta_server.nodes import Node
from meta_server.presence import Clock
from meta_server.slots import SlotArray
from stratakv.log import EventLogger
from stratakv.wire import Extent

PAGES_MAX = 16_384
"""Reclaimed in one go, so that lookups do not wait; the next tick goes on."""
AGES_SAMPLED_MAX = 64
"""Pages whose age is looked up, of those reclaimed in one go."""
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
        excess -= self._catalog.drop_spare(node, excess)
        slots = self._catalog.index.coldest(node.index, excess)[:PAGES_MAX]
        if len(slots):
            self._count_ages(node, slots)
            self.evictions += self._catalog.remove(slots, "evicted")
            _log.debug("pages_evicted", node=node.segment.node, pages=len(slots))

    def _count_ages(self, node: Node, slots: SlotArray) -> None:
        ticks = np.sort(self._catalog.index.slot_ticks(slots))
        at = np.linspace(0, len(ticks) - 1, min(len(ticks), AGES_SAMPLED_MAX)).astype(np.int64)
        ages_s = [self._ages.age_s(tick) for tick in ticks[at].tolist()]
        self.evicted_age_s = ages_s[len(ages_s) // 2]
        self._catalog.counts.evicted_ages[tier_of(node)].observe(ages_s, len(ticks))
