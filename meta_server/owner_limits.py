"""How many bytes each owner may have in memory and on disk, as a DB node said last. Read by `moves` and `owner_reclaim`.

In memory only: DB nodes read them from their tables and say them again every few seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from meta_server.counts import Tier
from meta_server.index import BlockIndex
from meta_server.slots import SlotArray
from stratakv.wire import OwnerLimit


class OwnerLimits:
    """Limits by owner."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index
        self._by_owner: dict[int, OwnerLimit] = {}
        self._barred: dict[Tier, list[int]] = {tier: [] for tier in Tier}

    def set(self, limits: Iterable[OwnerLimit]) -> None:
        """In the place of all before."""
        self._by_owner = {limit.owner: limit for limit in limits}
        self._barred = {tier: [owner for owner in self._by_owner if self.of(owner, tier) == 0] for tier in Tier}

    def of(self, owner: int, tier: Tier) -> int | None:
        """In bytes; None: no limit."""
        limit = self.get(owner)
        return limit.disk_bytes_max if tier is Tier.DISK else limit.memory_bytes_max

    def get(self, owner: int) -> OwnerLimit:
        """What was said of the owner; its id in the place of a name if nothing was."""
        return self._by_owner.get(owner) or OwnerLimit(owner, f"({owner})")

    def owners(self) -> list[int]:
        """Of whom something was said."""
        return list(self._by_owner)

    def allowed(self, slots: SlotArray, tier: Tier) -> SlotArray:
        """Those whose owners may have anything at all in the tier: the others need not be copied there."""
        barred = self._barred[tier]
        return slots[~np.isin(self._index.owners.of(slots), barred)] if barred else slots
