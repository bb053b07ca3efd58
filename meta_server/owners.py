"""Who wrote which page: owners by small numbers, and the bytes that each has on each segment.

An owner is the id of a tenant as DB nodes name it; 0 is nobody, whose pages are not counted. A number is an owner's as long as it
has pages. Changed by `index` only.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from meta_server.slots import SlotArray, SlotTable
from stratakv.log import EventLogger

NOBODY = 0
NUMBERS_MAX = 32_767
"""Owners with pages at one time; pages of further ones are nobody's. As many as the column's type has numbers."""
_log = EventLogger("meta_server.owners")


class Owners:
    """Kept in step with the table's column `owner`, so that nothing need be counted when somebody asks."""

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._number_of: dict[int, int] = {}
        self._ids: list[int] = [NOBODY]
        """By number."""
        self._free: list[int] = []
        self._sizes: dict[int, dict[int, int]] = {}
        """Number → segment → bytes, where there are any."""
        self._is_warned = False

    def enter(self, slots: SlotArray, owner: int) -> None:
        """These pages are new, all on one segment and of one size."""
        if not len(slots):
            return
        number = self._number(owner)
        self._table.owner[slots] = number
        if number != NOBODY:
            segment, size_bytes = int(self._table.segment[slots[0]]), int(self._table.page_bytes[slots[0]])
            sizes = self._sizes.setdefault(number, {})
            sizes[segment] = sizes.get(segment, 0) + len(slots) * size_bytes

    def leave(self, slots: SlotArray) -> None:
        """These pages are about to be no more."""
        owned = slots[self._table.owner[slots] != NOBODY]
        if not len(owned):
            return
        places = np.stack([self._table.owner[owned].astype(np.int64), self._table.segment[owned]], axis=1)
        distinct, which = np.unique(places, axis=0, return_inverse=True)
        left = np.zeros(len(distinct), np.int64)
        np.add.at(left, which.reshape(-1), self._table.page_bytes[owned])
        for (number, segment), size_bytes in zip(distinct.tolist(), left.tolist(), strict=True):
            self._take(number, segment, size_bytes)

    def of(self, slots: SlotArray) -> NDArray[np.int64]:
        """Who wrote the page of each slot."""
        found: NDArray[np.int64] = np.array(self._ids, np.int64)[self._table.owner[slots]]
        return found

    def pages(self, owner: int, segments: Collection[int]) -> SlotArray:
        """What an owner has on these segments. Takes time with the number of pages of all."""
        number, table = self._number_of.get(owner), self._table
        if number is None:
            return np.empty(0, np.int64)
        slots = np.flatnonzero(table.owner[: table.num_rows] == number)
        found: SlotArray = slots[np.isin(table.segment[slots], list(segments))]
        return found

    def sizes(self, segments: Collection[int]) -> dict[int, int]:
        """Owner → bytes on these segments together; only of those that have any there."""
        found = {}
        for number in self._sizes:
            owner = self._ids[number]
            if size_bytes := self.size_of(owner, segments):
                found[owner] = size_bytes
        return found

    def size_of(self, owner: int, segments: Collection[int]) -> int:
        """The same of one owner; 0 where it has none."""
        sizes = self._sizes.get(self._number_of.get(owner, NOBODY), {})
        return sum(size for segment, size in sizes.items() if segment in segments)

    def _number(self, owner: int) -> int:
        number = NOBODY if owner == NOBODY else self._number_of.get(owner)
        if number is not None:
            return number
        if self._free:
            number = self._free.pop()
            self._ids[number] = owner
        elif len(self._ids) <= NUMBERS_MAX:
            number = len(self._ids)
            self._ids.append(owner)
        else:
            if not self._is_warned:
                _log.warning("too_many_owners", owners_max=NUMBERS_MAX)
            self._is_warned = True
            return NOBODY
        self._number_of[owner] = number
        return number

    def _take(self, number: int, segment: int, size_bytes: int) -> None:
        sizes = self._sizes[number]
        sizes[segment] -= size_bytes
        assert sizes[segment] >= 0, "an owner lost more than it had"
        if not sizes[segment]:
            del sizes[segment]
        if not sizes:
            del self._sizes[number], self._number_of[self._ids[number]]
            self._free.append(number)
