"""Hot pages at several places: which ones readers elsewhere ask for again and again, and how they come to lie there too.

The daemon that has such a page copies it to another by a put of its own, as if it were drained (`dmp.drain`), and when the put
ends the block lies at one place more (`Catalog.replicate`). Off unless `meta.replicas_max` is more than 1. What was counted and
ordered is in memory only: after a restart it begins anew.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np

from meta_server.catalog import Catalog
from meta_server.counts import Tier
from meta_server.moves import MOVE_TIMEOUT_S
from meta_server.nodes import Node
from meta_server.owner_limits import OwnerLimits
from meta_server.placement import Placement
from meta_server.presence import Clock
from meta_server.records import extent_list
from meta_server.slots import SlotArray
from stratakv.settings import MetaSettings
from stratakv.wire import Extent, Move

COUNTED_MAX = 32_768
"""Pages, each with one of its readers' daemons, whose reads are counted; those that were not read longest are forgotten."""
PLANNED_BYTES_MAX = 64 * 1024 * 1024
"""Ordered and not begun yet, of all daemons together."""
PLANNED_PAGES_MAX = 4096
"""The same, for small pages."""


@dataclass(slots=True)
class _Plan:
    """A page is to lie in the segment `target` too."""

    target: int
    page_bytes: int
    owner: int
    until: float
    is_ordered: bool = False


class Replicas:
    """Counts reads, and orders copies of what is hot."""

    def __init__(
        self, catalog: Catalog, placement: Placement, clock: Clock, settings: MetaSettings, limits: OwnerLimits
    ) -> None:
        self._catalog = catalog
        self._limits = limits
        self._owner_share = min(settings.reclaim_low, settings.demote_low)
        self._placement = placement
        self._clock = clock
        self._places_max = settings.replicas_max
        self._reads_min = settings.replica_reads
        self._reads: OrderedDict[tuple[int, int, int, str], int] = OrderedDict()
        """By place and reader's daemon."""
        self._plans: dict[tuple[int, Extent], _Plan] = {}
        """By the place that has the page, oldest first."""
        self._planned_bytes: Counter[int] = Counter()
        """By target."""
        self._planned_of: Counter[int] = Counter()
        """Bytes by owner."""

    def read_at(self, slots: SlotArray, reader: str) -> SlotArray:
        """Where these blocks are to be read by one whose own daemon is `reader`."""
        if not len(self._catalog.index.copies):
            return slots
        node = self._catalog.nodes.get(reader)
        chosen = self._catalog.index.copies.chosen(slots, -1 if node is None else node.index)
        self._catalog.counts.replica_reads += int((chosen != slots).sum())
        return chosen

    def count(self, slots: SlotArray, read_at: SlotArray, reader: str) -> None:
        """They are being read at those places; what was read often enough by somebody elsewhere is to be copied."""
        if self._places_max <= 1 or (node := self._catalog.nodes.get(reader)) is None:
            return
        own = [n.index for n in self._catalog.nodes if reader in (n.segment.node, n.segment.disk_of)]
        away = slots[~np.isin(self._catalog.index.segments(read_at), own)]
        for slot, segment, offset, generation in zip(away.tolist(), *self._catalog.index.places(away), strict=True):
            entry = (segment, offset, generation, reader)
            count = self._reads.pop(entry, 0) + 1
            if count < self._reads_min or (segment, Extent(offset, generation)) in self._plans:
                self._reads[entry] = count
            else:
                self._plan(slot, node)
        while len(self._reads) > COUNTED_MAX:
            self._reads.popitem(last=False)

    def orders(self, source: Node) -> list[Move]:
        """What the node's daemon shall copy to other daemons now: to one of them at a time, so that one put takes many."""
        self._forget_late()
        waiting = [
            (extent, plan)
            for (segment, extent), plan in self._plans.items()
            if segment == source.index and not plan.is_ordered
        ]
        ordered = [(extent, plan) for extent, plan in waiting if plan.target == waiting[0][1].target]
        for _, plan in ordered:
            plan.is_ordered = True
        return [Move(extent, plan.page_bytes, plan.owner) for extent, plan in ordered]

    def grant(self, source: Node, namespace: bytes, keys: bytes, page_bytes: int) -> tuple[Node | None, list[int]]:
        """The source's daemon begins to copy: where to, and which of the pages. A plan is good for one put."""
        there, slots = self._catalog.index.lying_in(namespace, keys, source.index)
        places = [(source.index, extent) for extent in extent_list(self._catalog.index.extents(slots)[0])]
        planned = [(at, place) for at, place in zip(there.tolist(), places, strict=True) if place in self._plans]
        target = self._catalog.nodes.at(self._plans[planned[0][1]].target) if planned else None
        if target is None or not self._placement.takes(target):
            return None, []
        # A page that was ordered anew after its time was over may be asked for twice.
        once = {place: at for at, place in reversed(planned) if self._plans[place].target == target.index}
        wanted = sorted(once.items(), key=lambda one: one[1])
        wanted = wanted[: max(0, self._placement.room_for_replicas(target)) // page_bytes]
        for place, _ in wanted:
            self._forget(place)
        return target, [at for _, at in wanted]

    def _plan(self, slot: int, reader: Node) -> None:
        """Have the page copied to the reader's daemon, or to the emptiest one; not at all if none has room to spare."""
        index = self._catalog.index
        lies_in = index.copies.segments_of(slot)
        source = self._catalog.nodes.at(lies_in[0])
        slots = np.array([slot], np.int64)
        extents, sizes = index.extents(slots)
        place, page_bytes, owner = (lies_in[0], extent_list(extents)[0]), int(sizes[0]), int(index.owners.of(slots)[0])
        if source is None or source.segment.is_disk or source.is_draining or len(lies_in) >= self._places_max:
            return
        if not self._has_room(owner, page_bytes):
            return
        planned_bytes = self._planned_bytes.total()
        if planned_bytes + page_bytes > PLANNED_BYTES_MAX or len(self._plans) >= PLANNED_PAGES_MAX:
            return
        for target in self._placement.for_replicas(reader):
            room_bytes = self._placement.room_for_replicas(target) - self._planned_bytes[target.index]
            if target.index not in lies_in and room_bytes >= page_bytes:
                self._plans[place] = _Plan(target.index, page_bytes, owner, self._clock() + MOVE_TIMEOUT_S)
                self._planned_bytes[target.index] += page_bytes
                self._planned_of[owner] += page_bytes
                return

    def _has_room(self, owner: int, page_bytes: int) -> bool:
        """Whether the owner's pages would not have to leave for it."""
        limit = self._limits.of(owner, Tier.MEMORY)
        memory = {node.index for node in self._catalog.nodes if not node.segment.is_disk}
        size_bytes = self._catalog.index.owners.size_of(owner, memory) + self._planned_of[owner] + page_bytes
        return limit is None or size_bytes <= self._owner_share * limit

    def _forget(self, place: tuple[int, Extent]) -> None:
        plan = self._plans.pop(place)
        self._planned_bytes[plan.target] -= plan.page_bytes
        self._planned_of[plan.owner] -= plan.page_bytes
        if not self._planned_bytes[plan.target]:
            del self._planned_bytes[plan.target]
        if not self._planned_of[plan.owner]:
            del self._planned_of[plan.owner]

    def _forget_late(self) -> None:
        now = self._clock()
        for place, plan in list(self._plans.items()):
            if plan.until > now:
                break
            self._forget(place)
