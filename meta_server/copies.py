"""Blocks that lie at more than one place: which slot of the index is the first place of which others.

The key of a block leads to its first place; the others are known here alone, so that a block that lies at one place costs nothing.
When a first place goes or cannot be reached, another takes its stead. Changed by `index` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meta_server.slots import SlotArray, SlotTable


@dataclass(frozen=True, slots=True)
class Heirs:
    """First places of their blocks since just now, and those in whose stead."""

    old: SlotArray
    new: SlotArray

    def __len__(self) -> int:
        return len(self.new)

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> Heirs:
        """From (old, new)."""
        old, new = np.array(pairs, np.int64).reshape(-1, 2).T
        return cls(old, new)


class Copies:
    """First place → further ones, and back. Empty as long as nothing is replicated."""

    def __init__(self, table: SlotTable, is_reachable: Callable[[int], bool]) -> None:
        """`is_reachable`: whether the page of a slot can be read now."""
        self._table = table
        self._is_reachable = is_reachable
        self._further: dict[int, list[int]] = {}
        self._first: dict[int, int] = {}
        self._turn = 0

    def __len__(self) -> int:
        """Further places."""
        return len(self._first)

    @property
    def size_bytes(self) -> int:
        """Of the pages at further places."""
        return int(self._table.page_bytes[self._slots()].sum())

    def segments_of(self, slot: int) -> list[int]:
        """Where the block of a first place lies."""
        return [int(self._table.segment[place]) for place in (slot, *self._further.get(slot, ()))]

    def chosen(self, slots: SlotArray, own: int) -> SlotArray:
        """Where the blocks of these first places are to be read: in the segment `own` if they lie there, else spread.

        Neighbours are read from one place, so that a prefix of many blocks is a few long runs.
        """
        if not self._first:
            return slots
        segment, chosen = self._table.segment, slots.copy()
        self._turn += 1
        for at, slot in enumerate(slots.tolist()):
            if further := self._further.get(slot):
                places = sorted(filter(self._is_reachable, (slot, *further)), key=segment.__getitem__)
                spread = places[(at * len(places) // len(slots) + self._turn) % len(places)]
                chosen[at] = next((place for place in places if segment[place] == own), spread)
        return chosen

    def further_in(self, segment: int) -> SlotArray:
        """Further places in a segment."""
        slots = self._slots()
        found: SlotArray = slots[self._table.segment[slots] == segment]
        return found

    def redundant(self, segment: int, staying: Sequence[int]) -> SlotArray:
        """Pages of a segment that lie in one of the segments `staying` too."""
        found = []
        for first, further in self._further.items():
            where = self.segments_of(first)
            if segment in where and not set(where).isdisjoint(staying):
                found.append((first, *further)[where.index(segment)])
        return np.array(found, np.int64)

    def with_further(self, slots: SlotArray) -> SlotArray:
        """First places, and behind them their further ones."""
        more = [place for slot in slots.tolist() for place in self._further.get(slot, ())] if self._first else []
        return np.concatenate([slots, np.array(more, np.int64)]) if more else slots

    def without_further(self, slots: SlotArray) -> SlotArray:
        """The slots that are first places."""
        return slots[~np.isin(slots, self._slots())] if self._first else slots

    def are_several(self, slots: SlotArray) -> NDArray[np.bool_]:
        """Whether the page of each slot lies elsewhere too."""
        if not self._first:
            return np.zeros(len(slots), np.bool_)
        several: NDArray[np.bool_] = np.isin(slots, [*self._first, *self._further])
        return several

    def last_of(self, slots: SlotArray) -> SlotArray:
        """First places among the slots whose blocks have no place beside these slots."""
        if not self._first:
            return slots
        gone = set(slots.tolist())
        last = [s for s in slots.tolist() if s not in self._first and gone.issuperset(self._further.get(s, ()))]
        return np.array(last, np.int64)

    def add(self, first: int, further: int) -> None:
        self._further.setdefault(first, []).append(further)
        self._first[further] = first

    def succeed_unreachable(self) -> Heirs:
        """Places that can be reached become the first ones of their blocks."""
        pairs = [
            (first, heir)
            for first, further in self._further.items()
            if not self._is_reachable(first) and (heir := next(filter(self._is_reachable, further), None)) is not None
        ]
        for first, heir in pairs:
            self._succeed(first, heir)
            self.add(heir, first)
        return Heirs.of(pairs)

    def drop(self, slots: SlotArray) -> tuple[Heirs, int]:
        """These are places no longer: who takes the steads of first ones, reachable ones by preference; further ones dropped."""
        if not self._first:
            return Heirs.of([]), 0
        dropped = [slot for slot in slots.tolist() if slot in self._first]
        for slot in dropped:
            first = self._first.pop(slot)
            self._further[first].remove(slot)
            if not self._further[first]:
                del self._further[first]
        pairs = []
        for slot in slots.tolist():
            if further := self._further.get(slot):
                heir = next(filter(self._is_reachable, further), further[0])
                self._succeed(slot, heir)
                pairs.append((slot, heir))
        return Heirs.of(pairs), len(dropped)

    def _succeed(self, first: int, heir: int) -> None:
        """The heir and the other further places are without the first one from here on."""
        del self._first[heir]
        for slot in self._further.pop(first):
            if slot != heir:
                self.add(heir, slot)

    def _slots(self) -> SlotArray:
        return np.fromiter(self._first, np.int64, len(self._first))
