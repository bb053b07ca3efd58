"""The block index in memory: which committed pages there are, where they lie, which are coldest.

Per namespace, a table (`stratakv._native.KeyTable`) leads from a key to a slot, whose full key is compared on every hit.
Recency is exact: each touch stamps pages with a growing tick, a prefix's later blocks just colder than its earlier ones, so
that reclaiming takes leaves before what they hang on. A policy (`meta_server.policies`) chooses among them.

A block may lie at several places (`meta_server.copies`). Its key leads to the first one, which can be reached if any of them can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meta_server.copies import Copies, Heirs
from meta_server.owners import NOBODY, Owners
from meta_server.page_arrays import ExtentArray, History, Removed
from meta_server.policies import Candidates, Lru, Policy
from meta_server.slots import KEY_WORDS, NO_SEGMENT, SlotArray, SlotTable
from stratakv._native import KeyTable, make_key_table
from stratakv.keys import KEY_BYTES

_ABSENT = -1
_READS_MAX = 255


@dataclass(slots=True)
class _Names:
    """The keys of one namespace."""

    id: int
    namespace: bytes
    by_key: KeyTable = field(default_factory=lambda: make_key_table(KEY_WORDS, 0, KEY_WORDS))
    cost_per_byte: float = math.nan
    by_low: KeyTable | None = None
    """By the last 8 bytes of the key, once somebody has asked for it like that."""


class BlockIndex:
    """Every committed page of every live segment."""

    def __init__(self, policy: Policy | None = None) -> None:
        """`policy` chooses what goes first; by default the least recently used."""
        self._table = SlotTable()
        self.copies = Copies(self._table, self._is_reachable)
        self.owners = Owners(self._table)
        self._policy = policy or Lru()
        self._names: dict[bytes, _Names] = {}
        self._names_by_id: dict[int, _Names] = {}
        self._next_names_id = 0
        self._tick = 0
        self._kept: set[int] = set()
        self._available = np.zeros(16, np.bool_)
        self.num_blocks = 0
        self.bytes_committed = 0

    @property
    def size_bytes(self) -> int:
        """Memory of the index, without the allocator's overhead."""
        tables = (table for n in self._names.values() for table in (n.by_key, n.by_low) if table is not None)
        return self._table.size_bytes + sum(table.size_bytes for table in tables)

    def set_available(self, segment: int, available: bool) -> Heirs:
        """Whether the pages of a segment may be found (its daemon is alive); the places that take others' steads by that."""
        while segment >= len(self._available):
            self._available = np.concatenate([self._available, np.zeros_like(self._available)])
        self._available[segment] = available
        heirs = self.copies.succeed_unreachable()
        self._enter_heirs(heirs)
        return heirs

    def match(self, namespace: bytes, keys: bytes) -> SlotArray:
        """Slots of the leading keys that are there and can be reached now."""
        slots = self._find(namespace, keys)
        missed = np.flatnonzero(slots == _ABSENT)
        return slots[: missed[0]] if len(missed) else slots

    def absent(self, namespace: bytes, keys: bytes) -> list[int]:
        """Positions of the keys that are not there or cannot be reached now."""
        return [int(i) for i in np.flatnonzero(self._find(namespace, keys) == _ABSENT)]

    def find_low(self, namespace: bytes, low_keys: Sequence[int] | NDArray[np.int64]) -> SlotArray:
        """Of each key, given as its last 8 bytes (big-endian, signed), its slot; -1 if it is not there or out of reach."""
        names, table = self._names.get(namespace), self._table
        slots = np.full(len(low_keys), _ABSENT, np.int64)
        if names is None:
            return slots
        if names.by_low is None:
            names.by_low = make_key_table(KEY_WORDS, KEY_WORDS - 1, 1)
            live = np.flatnonzero((table.segment != NO_SEGMENT) & (table.namespace == names.id))
            names.by_low.enter(self.copies.without_further(live), table.key)
        names.by_low.find(np.asarray(low_keys, np.int64).astype(">i8").view(np.uint64), table.key, slots)
        return self._reachable(slots)

    def touch(self, slots: SlotArray, read_at: SlotArray | None = None) -> None:
        """The pages were asked for just now, in this order, and are read at those places."""
        self._tick += len(slots)
        self._table.tick[slots] = self._tick - np.arange(len(slots))
        if read_at is not None and read_at is not slots:
            self._table.tick[read_at] = self._table.tick[slots]

    def lying_in(self, namespace: bytes, keys: bytes, segment: int) -> tuple[NDArray[np.int64], SlotArray]:
        """Positions of the keys whose pages lie in a segment, and their slots."""
        slots = self._find(namespace, keys, reachable_only=False)
        there = np.flatnonzero((slots != _ABSENT) & (self._table.segment[slots] == segment))
        return there, slots[there]

    def present(self, namespace: bytes, keys: bytes) -> tuple[NDArray[np.int64], SlotArray]:
        """Positions of the keys that are there, in reach or not, and their slots."""
        slots = self._find(namespace, keys, reachable_only=False)
        there = np.flatnonzero(slots != _ABSENT)
        return there, slots[there]

    def worth_keeping(self, segment: int) -> SlotArray:
        """Pages of a segment that somebody has read there, or wants to stay."""
        table, slots = self._table, self.copies.without_further(self._table.live_in(segment))
        kept = np.isin(table.namespace[slots], list(self._kept))
        worthy: SlotArray = slots[(table.reads[slots] > 0) | (table.pins[slots] > 0) | kept]
        return worthy

    def hottest_first(self, slots: SlotArray) -> SlotArray:
        return slots[np.argsort(-self._table.tick[slots])]

    def history(self, slots: SlotArray) -> History:
        """What is known of how the pages were used."""
        return History(self._table.tick[slots], self._table.reads[slots])

    def set_history(self, namespace: bytes, keys: bytes, history: History) -> None:
        """Pages that have moved to another daemon are worth what they were."""
        slots = self._find(namespace, keys, reachable_only=False)
        known = slots != _ABSENT
        self._table.tick[slots[known]], self._table.reads[slots[known]] = history.ticks[known], history.reads[known]

    def ticks(self, namespace: bytes, keys: bytes) -> NDArray[np.int64]:
        """When each page was last asked for; -1 for those that are not there."""
        slots = self._find(namespace, keys, reachable_only=False)
        ticks: NDArray[np.int64] = np.where(slots == _ABSENT, _ABSENT, self._table.tick[slots])
        return ticks

    def slot_ticks(self, slots: SlotArray) -> NDArray[np.int64]:
        """When the page of each slot was last asked for."""
        ticks: NDArray[np.int64] = self._table.tick[slots]
        return ticks

    def set_ticks(self, namespace: bytes, keys: bytes, ticks: NDArray[np.int64]) -> None:
        """Pages that have moved stay as cold as they were."""
        slots = self._find(namespace, keys, reachable_only=False)
        known = (slots != _ABSENT) & (ticks != _ABSENT)
        self._table.tick[slots[known]] = ticks[known]

    def pin(self, slots: SlotArray) -> None:
        """Keep the pages from being reclaimed until `unpin`."""
        self._table.pin(slots)

    def unpin(self, slots: SlotArray) -> SlotArray:
        """Undo one `pin`; the slots whose pages left the index meanwhile and that nobody reads any more."""
        return self._table.unpin(slots)

    def are_pinned(self, slots: SlotArray) -> NDArray[np.bool_]:
        """Whether anybody holds a lease or a pin on each."""
        pinned: NDArray[np.bool_] = self._table.pins[slots] > 0
        return pinned

    def packed_places(self, slots: SlotArray) -> tuple[list[int], bytes, bytes]:
        """The segments that the slots lie in, and as `wire.Match` has them: which of these each does, its extent there."""
        table = self._table
        found, which = _distinct(table.segment[slots])
        extents = np.empty((len(slots), 2), np.int64)
        extents[:, 0], extents[:, 1] = table.offset[slots], table.generation[slots]
        return found, which.astype(np.uint16).tobytes(), extents.tobytes()

    def places(self, slots: SlotArray) -> tuple[list[int], list[int], list[int]]:
        """Segment, offset and generation of each slot."""
        table = self._table
        return table.segment[slots].tolist(), table.offset[slots].tolist(), table.generation[slots].tolist()

    def insert(
        self, namespace: bytes, keys: bytes, segment: int, extents: ExtentArray, page_bytes: int, owner: int = NOBODY
    ) -> ExtentArray:
        """Add pages of absent keys; the extents of those that were there already (surplus, to be freed).

        A place on a segment that cannot be reached must have been removed before (`unreachable`).
        """
        found = self._find(namespace, keys, reachable_only=False)
        new = np.flatnonzero(found == _ABSENT)
        rows = _words(keys)
        names = self._names_of(namespace)
        slots, table = self._table.allocate(len(new)), self._table
        table.key[slots] = rows[new]
        table.offset[slots], table.generation[slots] = extents[new, 0], extents[new, 1]
        table.page_bytes[slots], table.segment[slots], table.namespace[slots] = page_bytes, segment, names.id
        table.reads[slots] = 0
        table.enter(slots)
        is_new = np.frombuffer(names.by_key.enter(slots, table.key), np.bool_)
        table.release(slots[~is_new])
        kept, doubles = slots[is_new], new[~is_new]
        if names.by_low is not None:
            names.by_low.enter(kept, table.key)
        self.owners.enter(kept, owner)
        self.touch(kept)
        self._policy.inserted(table, kept)
        self.num_blocks += len(kept)
        self.bytes_committed += page_bytes * len(kept)
        surplus = np.concatenate([np.flatnonzero(found != _ABSENT), doubles])
        rejected: ExtentArray = extents[surplus]
        return rejected

    def unreachable(self, namespace: bytes, keys: bytes) -> SlotArray:
        """Slots of those keys that are there but on a segment that cannot be reached."""
        found = self._find(namespace, keys, reachable_only=False)
        there = np.unique(found[found != _ABSENT])
        away: SlotArray = there[~self._available[self._table.segment[there]]]
        return self.copies.with_further(away)

    def add_copies(
        self,
        slots: SlotArray,
        segment: int,
        extents: ExtentArray,
        page_bytes: int,
        places_max: int,
        owner: int = NOBODY,
    ) -> NDArray[np.bool_]:
        """Further places for the blocks of these first places; which were taken: others lie there already, or at enough places."""
        table = self._table
        taken, seen = np.zeros(len(slots), np.bool_), set()
        for at, slot in enumerate(slots.tolist()):
            lies_in = self.copies.segments_of(slot)
            taken[at] = segment not in lies_in and len(lies_in) < places_max and slot not in seen
            seen.add(slot)
        first, new = slots[taken], table.allocate(int(taken.sum()))
        for column in (table.key, table.namespace, table.tick, table.reads):
            column[new] = column[first]
        table.segment[new], table.page_bytes[new] = segment, page_bytes
        table.offset[new], table.generation[new] = extents[taken, 0], extents[taken, 1]
        table.enter(new)
        for slot, copy in zip(first.tolist(), new.tolist(), strict=True):
            self.copies.add(slot, copy)
        self.owners.enter(new, owner)
        self.bytes_committed += page_bytes * len(new)
        return taken

    def at(self, namespace: bytes, key: bytes, segment: int, offset: int, generation: int) -> SlotArray:
        """The slot of a key, if it lies exactly there; else none."""
        slots = self._find(namespace, key, reachable_only=False)
        slots, table = self.copies.with_further(slots[slots != _ABSENT]), self._table
        same = (table.segment[slots] == segment) & (table.offset[slots] == offset)
        exact: SlotArray = slots[same & (table.generation[slots] == generation)]
        return exact

    def exact(self, segment: int, extents: ExtentArray) -> NDArray[np.bool_]:
        """[extents]: whether a page of the segment lies exactly there. Takes time with the pages of the segment."""
        slots, table = self._table.live_in(segment), self._table
        there = set(zip(table.offset[slots].tolist(), table.generation[slots].tolist(), strict=True))
        return np.array([tuple(extent) in there for extent in extents.tolist()], np.bool_)

    def extents(self, slots: SlotArray) -> tuple[ExtentArray, NDArray[np.int64]]:
        """Places within their segment, and sizes in bytes."""
        table = self._table
        return np.stack([table.offset[slots], table.generation[slots]], axis=1), table.page_bytes[slots]

    def segments(self, slots: SlotArray) -> NDArray[np.int32]:
        """Segment of each slot."""
        found: NDArray[np.int32] = self._table.segment[slots]
        return found

    def count_read(self, slots: SlotArray) -> NDArray[np.uint8]:
        """How often each page was read at its place, this time included."""
        reads = self._table.reads
        reads[slots] = np.minimum(reads[slots], _READS_MAX - 1) + 1
        counted: NDArray[np.uint8] = reads[slots]
        return counted

    def in_segment(self, segment: int) -> SlotArray:
        """All pages of a segment."""
        return self._table.live_in(segment)

    def identify(self, slots: SlotArray) -> list[tuple[bytes, bytes]]:
        """Namespace and key of each slot."""
        table = self._table
        namespaces = [self._names_by_id[names_id].namespace for names_id in table.namespace[slots].tolist()]
        return list(zip(namespaces, (row.tobytes() for row in table.key[slots]), strict=True))

    def packed_keys(self, slots: SlotArray) -> bytes:
        """Keys of the slots' pages."""
        return self._table.key[slots].tobytes()

    def by_place(self, slots: SlotArray) -> list[tuple[bytes, int, SlotArray]]:
        """The slots by namespace and segment of their pages."""
        table, found = self._table, []
        ids, segments = table.namespace[slots], table.segment[slots]
        for names_id in np.unique(ids).tolist():
            for segment in np.unique(segments[ids == names_id]).tolist():
                mine = slots[(ids == names_id) & (segments == segment)]
                found.append((self._names_by_id[names_id].namespace, segment, mine))
        return found

    def groups(self, first: int, count: int) -> tuple[list[tuple[bytes, int, SlotArray]], int]:
        """Of `count` slots from `first` on, first places by namespace and segment; the slot behind them, 0 at the end."""
        table, end = self._table, min(first + count, self._table.num_rows)
        slots = self.copies.without_further(first + np.flatnonzero(table.segment[first:end] != NO_SEGMENT))
        return self.by_place(slots), end if first < end < table.num_rows else 0

    def unpinned(self, segment: int, namespace: bytes = b"") -> SlotArray:
        """Pages of a segment (of one namespace or of all) that nobody holds a lease on."""
        table = self._table
        slots = table.live_in(segment)
        slots = np.extract(table.pins[slots] == 0, slots)
        if namespace:
            names = self._names.get(namespace)
            slots = slots[table.namespace[slots] == names.id] if names else slots[:0]
        return slots

    def spare(self, segment: int, size_bytes: int, namespace: bytes = b"") -> SlotArray:
        """The unpinned pages of a segment that are further places of their blocks, coldest first, to free `size_bytes`."""
        slots = self.copies.further_in(segment)
        if size_bytes <= 0 or not len(slots):
            return slots[:0]
        table, slots = self._table, np.intersect1d(slots, self.unpinned(segment, namespace))
        slots = slots[np.argsort(table.tick[slots], kind="stable")]
        return slots[: int(np.searchsorted(np.cumsum(table.page_bytes[slots]), size_bytes)) + 1]

    def coldest(self, segment: int, size_bytes: int, namespace: bytes = b"") -> SlotArray:
        """The unpinned pages of a segment that go first, and together free `size_bytes`; all there are, if too few.

        First places of their blocks only (before these go the `spare` ones); of one namespace, or of all that are not kept.
        """
        slots = self.copies.without_further(self.unpinned(segment, namespace))
        if not namespace and self._kept:
            slots = slots[~np.isin(self._table.namespace[slots], list(self._kept))]
        return self.first_to_go(slots, size_bytes)

    def first_to_go(self, slots: SlotArray, size_bytes: int) -> SlotArray:
        """Those of the slots that the policy gives up first, which together free `size_bytes`; all, if too few."""
        costs = np.full(self._next_names_id, np.nan)
        for names in self._names.values():
            costs[names.id] = names.cost_per_byte
        return self._policy.victims(Candidates(self._table, slots, costs[self._table.namespace[slots]]), size_bytes)

    def keep(self, namespace: bytes, is_kept: bool) -> None:
        """Whether pages of the namespace stay when room is needed."""
        names_id = self._names_of(namespace).id
        (self._kept.add if is_kept else self._kept.discard)(names_id)
        self._forget_if_empty(self._names_of(namespace))

    def learn_cost(self, namespace: bytes, cost_per_byte: float) -> None:
        """How long a byte of the namespace takes to compute again, in any unit."""
        if (names := self._names.get(namespace)) is not None:
            names.cost_per_byte = cost_per_byte

    def size_of(self, namespace: bytes, segment: int) -> int:
        """Bytes of a namespace's pages on a segment."""
        names, table = self._names.get(namespace), self._table
        if names is None:
            return 0
        slots = table.live_in(segment)
        return int(table.page_bytes[slots[table.namespace[slots] == names.id]].sum())

    def read_before(self, namespace: bytes, tick: int) -> SlotArray:
        """Unpinned pages of a namespace that were last asked for before the tick."""
        names, table = self._names.get(namespace), self._table
        if names is None:
            return np.empty(0, np.int64)
        old = (table.namespace == names.id) & (table.segment != NO_SEGMENT) & (table.tick < tick) & (table.pins == 0)
        return np.flatnonzero(old)

    @property
    def tick(self) -> int:
        """Of the page that was asked for last."""
        return self._tick

    def count(self, namespace: bytes) -> int:
        """Blocks of a namespace."""
        return len(names.by_key) if (names := self._names.get(namespace)) is not None else 0

    def usage(self) -> dict[bytes, dict[int, tuple[int, int]]]:
        """Namespace → segment → pages and bytes. Takes time with the number of pages."""
        table = self._table
        live = np.flatnonzero(table.segment != NO_SEGMENT)
        found: dict[bytes, dict[int, tuple[int, int]]] = {}
        for names in self._names.values():
            mine = live[table.namespace[live] == names.id]
            by_segment = found[names.namespace] = {}
            for segment in np.unique(table.segment[mine]).tolist():
                sizes = table.page_bytes[mine[table.segment[mine] == segment]]
                by_segment[segment] = len(sizes), int(sizes.sum())
        return found

    def remove(self, slots: SlotArray) -> Removed:
        """Take pages out; nothing finds them there from here on."""
        table = self._table
        self.owners.leave(slots)
        heirs, num_copies = self.copies.drop(slots)
        self._enter_heirs(heirs)
        removed = Removed(
            slots=slots,
            segments=table.segment[slots],
            extents=np.stack([table.offset[slots], table.generation[slots]], axis=1),
            page_bytes=table.page_bytes[slots],
            pinned=table.pins[slots] > 0,
            num_copies=num_copies,
            heirs=heirs,
        )
        names_of = table.namespace[slots]
        for names_id in np.unique(names_of).tolist():
            names, mine = self._names_by_id[names_id], slots[names_of == names_id]
            names.by_key.leave(mine, table.key)
            if names.by_low is not None:
                names.by_low.leave(mine, table.key)
            self._forget_if_empty(names)
        table.release(slots)
        self.num_blocks -= len(slots) - num_copies - len(heirs)
        self.bytes_committed -= int(removed.page_bytes.sum())
        return removed

    def _find(self, namespace: bytes, keys: bytes, *, reachable_only: bool = True) -> SlotArray:
        names = self._names.get(namespace)
        slots = np.full(len(keys) // KEY_BYTES, _ABSENT, np.int64)
        if names is None:
            return slots
        names.by_key.find(keys, self._table.key, slots)
        return self._reachable(slots) if reachable_only else slots

    def _reachable(self, slots: SlotArray) -> SlotArray:
        """The same, ABSENT where a slot's segment is out of reach."""
        hits = np.flatnonzero(slots != _ABSENT)
        slots[hits[~self._available[self._table.segment[slots[hits]]]]] = _ABSENT
        return slots

    def _is_reachable(self, slot: int) -> bool:
        return bool(self._available[self._table.segment[slot]])

    def _enter_heirs(self, heirs: Heirs) -> None:
        """Lead the keys to other places, which are worth what the old ones were."""
        if not len(heirs):
            return
        table = self._table
        names_of = table.namespace[heirs.new]
        for names_id in np.unique(names_of).tolist():
            names, mine = self._names_by_id[names_id], names_of == names_id
            for keys in (names.by_key, names.by_low):
                if keys is not None:
                    keys.leave(heirs.old[mine], table.key)
                    keys.enter(heirs.new[mine], table.key)
        for column in (table.tick, table.reads, table.in_main):
            column[heirs.new] = np.maximum(column[heirs.new], column[heirs.old])

    def _names_of(self, namespace: bytes) -> _Names:
        names = self._names.get(namespace)
        if names is None:
            names = _Names(self._next_names_id, namespace)
            self._next_names_id += 1
            self._names[namespace] = self._names_by_id[names.id] = names
        return names

    def _forget_if_empty(self, names: _Names) -> None:
        if not len(names.by_key) and names.id not in self._kept:
            del self._names[names.namespace], self._names_by_id[names.id]


def _distinct(segments: NDArray[np.int32]) -> tuple[list[int], NDArray[np.int64]]:
    """The segments, and of each element which of them it is. Mostly there is one, and nothing to be sorted."""
    if len(segments) and (segments == segments[0]).all():
        return [int(segments[0])], np.zeros(len(segments), np.int64)
    found, which = np.unique(segments, return_inverse=True)
    return found.tolist(), which


def _words(keys: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(keys, np.uint64).reshape(-1, KEY_WORDS)
