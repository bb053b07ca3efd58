"""Which pages of a full segment go first: `meta.policy` chooses one of these.

    cost (default)  least recently used, but each doubling of what a page is worth lets it stay one turnover of its segment longer;
                    worth is how often it was read, and how long its bytes would take to compute again
    lru             least recently used
    lfu             least often read, then least recently used
    s3fifo          three queues (Yang et al., SOSP 2023): new pages prove themselves in a small one; what was given up there and
                    comes again goes to the main one at once

All give up the later blocks of a prefix before the earlier ones, without which they cannot be found.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meta_server.slots import SlotArray, SlotTable
from stratakv.settings import EvictionPolicy

SMALL_SHARE = 0.1
"""Of the bytes, for the small queue of S3-FIFO."""
READS_COUNTED_MAX = 3
GHOSTS_MAX = 100_000
"""Pages given up by the small queue that are remembered."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Pages of one segment that may be given up."""

    table: SlotTable
    slots: SlotArray
    cost_per_byte: NDArray[np.float64]
    """Time to compute the page again over its size, in any unit; NaN where that is not known."""


class Policy(Protocol):
    """Keeps its own state, if it has any, in the table's columns."""

    def inserted(self, table: SlotTable, slots: SlotArray) -> None:
        """These pages are new."""

    def victims(self, pages: Candidates, size_bytes: int) -> SlotArray:
        """Those that together free `size_bytes`, first to go first; all there are, if they are too few."""


def make_policy(name: EvictionPolicy) -> Policy:
    """A new one, for all segments of one index."""
    match name:
        case EvictionPolicy.COST:
            return CostAware()
        case EvictionPolicy.LRU:
            return Lru()
        case EvictionPolicy.LFU:
            return Lfu()
        case EvictionPolicy.S3FIFO:
            return S3Fifo()


class _Ordered:
    """A policy that is only an order of pages."""

    def inserted(self, table: SlotTable, slots: SlotArray) -> None:
        """Nothing to keep."""

    def victims(self, pages: Candidates, size_bytes: int) -> SlotArray:
        if size_bytes <= 0 or not len(pages.slots):
            return pages.slots[:0]
        slots = pages.slots[self._order(pages)]
        enough = int(np.searchsorted(np.cumsum(pages.table.page_bytes[slots]), size_bytes)) + 1
        return slots[:enough]

    def _order(self, pages: Candidates) -> NDArray[np.int64]:
        raise NotImplementedError


class Lru(_Ordered):
    def _order(self, pages: Candidates) -> NDArray[np.int64]:
        return np.argsort(pages.table.tick[pages.slots])


class Lfu(_Ordered):
    def _order(self, pages: Candidates) -> NDArray[np.int64]:
        return np.lexsort((pages.table.tick[pages.slots], pages.table.reads[pages.slots]))


class CostAware(_Ordered):
    def _order(self, pages: Candidates) -> NDArray[np.int64]:
        """Ticks count pages that were touched, so as many ticks as there are pages are one turnover."""
        table, slots = pages.table, pages.slots
        known = pages.cost_per_byte[~np.isnan(pages.cost_per_byte)]
        usual = float(np.median(known)) if len(known) else 1.0
        cost = np.where(np.isnan(pages.cost_per_byte), 1.0, pages.cost_per_byte / usual)
        worth = np.log2((1.0 + table.reads[slots]) * np.maximum(cost, np.finfo(np.float64).tiny))
        return np.argsort(table.tick[slots] + len(slots) * worth, kind="stable")


class S3Fifo:
    """Reads are counted to READS_COUNTED_MAX; a page read since it came moves on instead of being given up."""

    def __init__(self) -> None:
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def inserted(self, table: SlotTable, slots: SlotArray) -> None:
        for slot in slots.tolist():
            table.in_main[slot] = self._ghosts.pop(table.key[slot].tobytes(), self) is None

    def victims(self, pages: Candidates, size_bytes: int) -> SlotArray:
        table, slots = pages.table, pages.slots[np.argsort(pages.table.entered[pages.slots])]
        small = slots[~table.in_main[slots]].tolist()
        main = slots[table.in_main[slots]].tolist()
        small_bytes = int(table.page_bytes[small].sum())
        small_bytes_max = SMALL_SHARE * int(table.page_bytes[slots].sum())
        chosen: list[int] = []
        freed_bytes = 0
        next_small = next_main = 0
        while freed_bytes < size_bytes:
            if next_small < len(small) and (small_bytes > small_bytes_max or next_main == len(main)):
                slot, next_small = small[next_small], next_small + 1
                small_bytes -= int(table.page_bytes[slot])
                if table.reads[slot]:
                    self._to_main(table, slot)
                    main.append(slot)
                    continue
                self._remember(table.key[slot].tobytes())
            elif next_main < len(main):
                slot, next_main = main[next_main], next_main + 1
                if table.reads[slot]:
                    reads = min(int(table.reads[slot]), READS_COUNTED_MAX) - 1
                    self._to_main(table, slot)
                    table.reads[slot] = reads
                    main.append(slot)
                    continue
            else:
                break
            chosen.append(slot)
            freed_bytes += int(table.page_bytes[slot])
        return np.array(chosen, np.int64)

    def _to_main(self, table: SlotTable, slot: int) -> None:
        table.in_main[slot], table.reads[slot] = True, 0
        table.entered[slot] = table.next_entry()

    def _remember(self, key: bytes) -> None:
        self._ghosts[key] = None
        if len(self._ghosts) > GHOSTS_MAX:
            self._ghosts.popitem(last=False)
