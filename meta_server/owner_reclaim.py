"""Holds each owner to its bytes: of one that has more its own coldest pages go, and no one else's.

A limit is to an owner what its size is to a segment, with the same levels: in memory its coldest pages are sent to disk above
`demote_high` of it, and removed above `reclaim_high`. Pages that are leased or pinned stay; a rule that keeps a namespace is
about room, and not about this. Looked at once a second, by the server's dispatch: no request waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meta_server.catalog import Catalog
from meta_server.counts import Tier, tier_of
from meta_server.moves import Moves
from meta_server.nodes import Node
from meta_server.owner_limits import OwnerLimits
from meta_server.presence import Clock
from meta_server.reclaim import PAGES_MAX
from meta_server.slots import SlotArray
from meta_server.validate import check_owner_limits
from stratakv.log import EventLogger
from stratakv.settings import MetaSettings
from stratakv.wire import Done, ListOwners, OwnerState, OwnerStates, SetOwnerLimits

APPLY_S = 1.0
OWNERS_MAX = 8
"""Whose pages are looked through in one go, in each tier; then it is the turn of others."""
REASON = "tenant_quota"
_log = EventLogger("meta_server.owner_reclaim")


@dataclass(frozen=True, slots=True)
class _Excess:
    """An owner that is near its limit in a tier, or beyond it."""

    owner: int
    size_bytes: int
    limit_bytes: int


class OwnerReclaimer:
    """Takes limits, tells what they are used by, and applies them."""

    def __init__(
        self, catalog: Catalog, moves: Moves, limits: OwnerLimits, clock: Clock, settings: MetaSettings
    ) -> None:
        self._catalog = catalog
        self._moves = moves
        self._limits = limits
        self._clock = clock
        self._settings = settings
        self._apply_at = clock()
        self._last = dict.fromkeys(Tier, 0)
        """Whose turn it was last."""

    def set_limits(self, request: SetOwnerLimits) -> Done:
        check_owner_limits(request.limits)
        self._limits.set(request.limits)
        return Done()

    def states(self, _: ListOwners) -> OwnerStates:
        """Of everybody who has pages or a limit, by id."""
        memory, disk = (self._sizes(tier) for tier in Tier)
        owners = sorted({*memory, *disk, *self._limits.owners()})
        return OwnerStates([OwnerState(self._limits.get(o), memory.get(o, 0), disk.get(o, 0)) for o in owners])

    def apply(self) -> None:
        """Send down or remove what is too much."""
        now = self._clock()
        if now < self._apply_at:
            return
        self._apply_at = now + APPLY_S
        for tier in Tier:
            for excess in self._beyond(tier)[:OWNERS_MAX]:
                self._shrink(tier, excess)
                self._last[tier] = excess.owner

    def _beyond(self, tier: Tier) -> list[_Excess]:
        """Those with too much, from the one on whose turn is next."""
        high = self._settings.reclaim_high
        if tier is Tier.MEMORY and any(self._moves.disk_of(node) for node in self._nodes(tier)):
            high = min(high, self._settings.demote_high)
        found = [
            _Excess(owner, size_bytes, limit)
            for owner, size_bytes in self._sizes(tier).items()
            if (limit := self._limits.of(owner, tier)) is not None and size_bytes > high * limit
        ]
        return sorted(found, key=lambda excess: (excess.owner <= self._last[tier], excess.owner))

    def _shrink(self, tier: Tier, excess: _Excess) -> None:
        index, limit = self._catalog.index, excess.limit_bytes
        slots = index.owners.pages(excess.owner, {node.index for node in self._nodes(tier)})
        slots = slots[~index.are_pinned(slots)]
        first = index.copies.without_further(slots)
        size_bytes = excess.size_bytes
        low = self._settings.reclaim_low
        if tier is Tier.MEMORY:
            goal = int(min(self._settings.demote_low, low) * limit)
            size_bytes -= self._remove_spare(np.setdiff1d(slots, first), size_bytes - goal)
            going = self._sent_down(self._coldest(first, size_bytes - goal))
            size_bytes -= int(index.extents(going)[1].sum())
            first = np.setdiff1d(first, going)
        if size_bytes > self._settings.reclaim_high * limit:
            self._remove(self._coldest(first, size_bytes - int(low * limit)))

    def _coldest(self, slots: SlotArray, size_bytes: int) -> SlotArray:
        """What goes first of the pages, as much as can be in one go: a limit may have become much smaller."""
        index = self._catalog.index
        size_bytes_max = PAGES_MAX * int(index.extents(slots)[1].max(initial=0))
        return index.first_to_go(slots, min(size_bytes, size_bytes_max))[:PAGES_MAX]

    def _remove_spare(self, slots: SlotArray, size_bytes: int) -> int:
        """Of pages that lie elsewhere too the coldest, which together free so much; how much that is."""
        if size_bytes <= 0 or not len(slots):
            return 0
        index = self._catalog.index
        slots = slots[np.argsort(index.slot_ticks(slots), kind="stable")][:PAGES_MAX]
        sizes = np.cumsum(index.extents(slots)[1])
        count = min(int(np.searchsorted(sizes, size_bytes)) + 1, len(slots))
        self._remove(slots[:count])
        return int(sizes[count - 1])

    def _sent_down(self, slots: SlotArray) -> SlotArray:
        """Those of the pages that are on their way to a disk now."""
        index = self._catalog.index
        slots = slots[~index.copies.are_several(slots)]
        segments, going = index.segments(slots), np.zeros(len(slots), np.bool_)
        for segment in np.unique(segments).tolist():
            mine: NDArray[np.bool_] = segments == segment
            node = self._catalog.nodes.at(segment)
            if node is not None:
                going[mine] = self._moves.send_down(node, slots[mine])
        return slots[going]

    def _remove(self, slots: SlotArray) -> None:
        if len(slots):
            self._catalog.remove(slots, REASON)
            _log.debug("pages_removed", reason=REASON, pages=len(slots))

    def _nodes(self, tier: Tier) -> list[Node]:
        """Pages of a daemon that is silent use nothing, until it is back."""
        return [node for node in self._catalog.nodes if node.reachable and tier_of(node) is tier]

    def _sizes(self, tier: Tier) -> dict[int, int]:
        return self._catalog.index.owners.sizes({node.index for node in self._nodes(tier)})
