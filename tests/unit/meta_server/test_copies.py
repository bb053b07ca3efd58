"""Blocks at several places against a dictionary: a block is found as long as one of its places can be reached."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meta_server.index import BlockIndex
from tests.unit.meta_server.test_index import KEYS, PAGE_BYTES, SPACES

PLACES_MAX = 3
SEGMENTS = range(4)
Extent = tuple[int, int]
segments = st.sampled_from(list(SEGMENTS))
key_lists = st.lists(st.sampled_from(KEYS[:6]), min_size=1, max_size=6, unique=True)


class CopiesMachine(RuleBasedStateMachine):
    """`self.places`: key → segment → extent."""

    @initialize()
    def start(self) -> None:
        self.index = BlockIndex()
        self.places: dict[bytes, dict[int, Extent]] = {}
        self.reachable = dict.fromkeys(SEGMENTS, True)
        self.extents = 0
        for segment in SEGMENTS:
            self.index.set_available(segment, True)

    @rule(keys=key_lists, segment=segments)
    def insert(self, keys: list[bytes], segment: int) -> None:
        gone = self.index.unreachable(SPACES[0], b"".join(keys))
        self._forget(gone)
        self.index.remove(gone)
        extents = self._new_extents(len(keys))
        self.index.insert(SPACES[0], b"".join(keys), segment, extents, PAGE_BYTES)
        for name, (offset, generation) in zip(keys, extents.tolist(), strict=True):
            self.places.setdefault(name, {segment: (offset, generation)})

    @rule(keys=key_lists, segment=segments)
    def copy(self, keys: list[bytes], segment: int) -> None:
        if not self.reachable[segment]:
            return
        slots = self.index.match(SPACES[0], b"".join(keys))
        extents = self._new_extents(len(slots))
        taken = self.index.add_copies(slots, segment, extents, PAGE_BYTES, PLACES_MAX)
        for name, (offset, generation), is_taken in zip(keys, extents.tolist(), taken.tolist(), strict=False):
            places = self.places[name]
            assert is_taken == (segment not in places and len(places) < PLACES_MAX)
            if is_taken:
                places[segment] = (offset, generation)

    @rule(name=st.sampled_from(KEYS[:6]), segment=segments)
    def remove_one(self, name: bytes, segment: int) -> None:
        extent = self.places.get(name, {}).get(segment, (-1, -1))
        slots = self.index.at(SPACES[0], name, segment, *extent)
        assert len(slots) == (segment in self.places.get(name, {}))
        self._forget(slots)
        removed = self.index.remove(slots)
        assert len(removed.heirs) + removed.num_copies == (len(slots) if name in self.places else 0)

    @rule(segment=segments)
    def lose_segment(self, segment: int) -> None:
        slots = self.index.in_segment(segment)
        last = self.index.copies.last_of(slots)
        only_here = {name for name, places in self.places.items() if set(places) == {segment}}
        assert {key for _, key in self.index.identify(last)} == only_here
        self._forget(slots)
        self.index.remove(slots)

    @rule(segment=segments)
    def switch_reachable(self, segment: int) -> None:
        self.reachable[segment] = not self.reachable[segment]
        heirs = self.index.set_available(segment, self.reachable[segment])
        assert self.index.identify(heirs.old) == self.index.identify(heirs.new)

    @rule(keys=key_lists, own=segments)
    def read(self, keys: list[bytes], own: int) -> None:
        slots = self.index.match(SPACES[0], b"".join(keys))
        chosen = self.index.copies.chosen(slots, own)
        where, offsets, generations = self.index.places(chosen)
        for name, *place in zip(keys, where, offsets, generations, strict=False):
            places = self.places[name]
            assert places[place[0]] == tuple(place[1:])
            assert self.reachable[place[0]]
            assert place[0] == own or own not in places or not self.reachable[own]

    @rule(segment=segments)
    def find_what_may_be_spared(self, segment: int) -> None:
        spare = self.index.spare(segment, 100 * PAGE_BYTES)
        coldest = self.index.coldest(segment, 100 * PAGE_BYTES)
        both = [key for _, key in self.index.identify(np.concatenate([spare, coldest]))]
        assert sorted(both) == sorted(name for name, places in self.places.items() if segment in places)
        assert all(len(self.places[key]) > 1 for _, key in self.index.identify(spare))

    @invariant()
    def exactly_what_can_be_reached_is_found(self) -> None:
        found = set(KEYS[:6]) - {KEYS[i] for i in self.index.absent(SPACES[0], b"".join(KEYS[:6]))}
        assert found == {name for name, places in self.places.items() if any(map(self.reachable.get, places))}
        low = [int.from_bytes(name[-8:], "big", signed=True) for name in KEYS[:6]]
        assert {KEYS[i] for i in np.flatnonzero(self.index.find_low(SPACES[0], low) >= 0)} == found
        assert self.index.num_blocks == len(self.places)
        assert self.index.bytes_committed == sum(map(len, self.places.values())) * PAGE_BYTES

    def _new_extents(self, count: int) -> np.ndarray:
        self.extents += count
        return np.array([(self.extents - i, 7) for i in range(count)], np.int64).reshape(-1, 2)

    def _forget(self, slots: np.ndarray) -> None:
        for (_, name), segment in zip(self.index.identify(slots), self.index.segments(slots).tolist(), strict=True):
            del self.places[name][segment]
            if not self.places[name]:
                del self.places[name]


TestCopies = CopiesMachine.TestCase
TestCopies.settings = settings(max_examples=60, stateful_step_count=40)
