"""Columns of the block index: one row (slot) per committed page, in numpy arrays of about 80 bytes a row.

A slot that readers hold a lease on is pinned; if its page leaves the index meanwhile, the slot is reused only after the
last unpin, so that a lease never speaks of a page it was not given for. Used by `index` only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SlotArray = NDArray[np.int64]
KEY_WORDS = 4
"""A 32-byte key as 64-bit words."""
NO_SEGMENT = -1
_ROWS_AT_START = 1024
_GROWTH = 1.25
_ONE = np.int32(1)
"""Of the column's type: numpy takes fifty times as long to add any other."""


class SlotTable:
    """Rows of equal kind with a free list; a row is live while `segment` is not NO_SEGMENT."""

    def __init__(self) -> None:
        self.key = np.zeros((_ROWS_AT_START, KEY_WORDS), np.uint64)
        self.offset = np.zeros(_ROWS_AT_START, np.int64)
        self.generation = np.zeros(_ROWS_AT_START, np.int64)
        self.tick = np.zeros(_ROWS_AT_START, np.int64)
        self.page_bytes = np.zeros(_ROWS_AT_START, np.int64)
        self.segment = np.full(_ROWS_AT_START, NO_SEGMENT, np.int32)
        self.namespace = np.zeros(_ROWS_AT_START, np.int32)
        self.owner = np.zeros(_ROWS_AT_START, np.int16)
        """By the number it has in `owners`."""
        self.reads = np.zeros(_ROWS_AT_START, np.uint8)
        self.entered = np.zeros(_ROWS_AT_START, np.int64)
        """Place in its queue, for policies that keep one."""
        self.in_main = np.zeros(_ROWS_AT_START, np.bool_)
        self.pins = np.zeros(_ROWS_AT_START, np.int32)
        self._num_used = 0
        self._num_entered = 0
        self._free: list[int] = []

    @property
    def size_bytes(self) -> int:
        """Memory of the columns."""
        return sum(column.nbytes for column in self._columns().values())

    @property
    def num_rows(self) -> int:
        """Rows that are or were in use."""
        return self._num_used

    def allocate(self, count: int) -> SlotArray:
        """Slots for `count` new rows; the caller fills every column but `pins`."""
        reused = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = range(self._num_used, self._num_used + count - len(reused))
        self._num_used = fresh.stop
        self._grow_to(self._num_used)
        return np.array([*reused, *fresh], np.int64)

    def enter(self, slots: SlotArray) -> None:
        """To the ends of their queues, the last slot first."""
        self._num_entered += len(slots)
        self.entered[slots] = self._num_entered - np.arange(len(slots))
        self.in_main[slots] = False

    def next_entry(self) -> int:
        """The end of a queue."""
        self._num_entered += 1
        return self._num_entered

    def release(self, slots: SlotArray) -> None:
        """The rows are live no longer; unpinned ones are reused from now on, pinned ones after their last unpin."""
        self.segment[slots] = NO_SEGMENT
        self._free.extend(slots[self.pins[slots] == 0].tolist())

    def pin(self, slots: SlotArray) -> None:
        np.add.at(self.pins, slots, _ONE)

    def unpin(self, slots: SlotArray) -> SlotArray:
        """Undo one `pin`; the slots of pages that left the index meanwhile and that nobody reads any more."""
        np.subtract.at(self.pins, slots, _ONE)
        assert (self.pins[slots] >= 0).all(), "a slot was unpinned more often than pinned"
        gone = slots[self.segment[slots] == NO_SEGMENT]
        gone = np.unique(gone[self.pins[gone] == 0])
        self._free.extend(gone.tolist())
        return gone

    def live_in(self, segment: int) -> SlotArray:
        """All live slots of one segment."""
        return np.flatnonzero(self.segment[: self._num_used] == segment)

    def _columns(self) -> dict[str, NDArray[np.generic]]:
        return {name: column for name, column in vars(self).items() if isinstance(column, np.ndarray)}

    def _grow_to(self, rows: int) -> None:
        if rows <= len(self.segment):
            return
        capacity = max(rows, int(len(self.segment) * _GROWTH))
        for name, column in self._columns().items():
            fill = NO_SEGMENT if name == "segment" else 0
            grown = np.full((capacity, *column.shape[1:]), fill, column.dtype)
            grown[: len(column)] = column
            setattr(self, name, grown)
