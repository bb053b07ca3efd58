"""The block index against a dictionary and a list: what is found, what is coldest, what leases keep."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meta_server.index import BlockIndex

PAGE_BYTES = 4096
SPACES = [b"x" * 16, b"y" * 16]


def key(number: int) -> bytes:
    """Keys of which many share their first 8 bytes, so that fingerprints collide."""
    return (number // 3).to_bytes(8, "big") + hashlib.sha256(str(number).encode()).digest()[:24]


KEYS = [key(number) for number in range(12)]
spaces = st.sampled_from(SPACES)
key_lists = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6)


class IndexMachine(RuleBasedStateMachine):
    """`self.pages`: (namespace, key) → (segment, extent), coldest first."""

    @initialize()
    def start(self) -> None:
        self.index = BlockIndex()
        self.pages: dict[tuple[bytes, bytes], tuple[int, tuple[int, int]]] = {}
        self.pins: list[tuple[list[tuple[bytes, bytes]], np.ndarray]] = []
        self.reachable = {0: True, 1: True}
        self.extents = 0
        for segment in self.reachable:
            self.index.set_available(segment, True)

    @rule(space=spaces, keys=key_lists, segment=st.sampled_from([0, 1]))
    def insert(self, space: bytes, keys: list[bytes], segment: int) -> None:
        extents = np.array([(self.extents + i, 7) for i in range(len(keys))], np.int64)
        self.extents += len(keys)
        surplus = self.index.insert(space, b"".join(keys), segment, extents, PAGE_BYTES)
        expected = set()
        added = []
        for name, extent in zip(keys, extents.tolist(), strict=True):
            if (space, name) in self.pages:
                expected.add(tuple(extent))
            else:
                self.pages[space, name] = (segment, (extent[0], extent[1]))
                added.append((space, name))
        assert {tuple(e) for e in surplus.tolist()} == expected
        self._touched(added)

    @rule(space=spaces, keys=key_lists)
    def find_by_the_ends_of_keys(self, space: bytes, keys: list[bytes]) -> None:
        slots = self.index.find_low(space, [int.from_bytes(name[-8:], "big", signed=True) for name in keys])
        for name, slot in zip(keys, slots.tolist(), strict=True):
            page = self.pages.get((space, name))
            if page is None or not self.reachable[page[0]]:
                assert slot == -1
            else:
                segments, offsets, generations = self.index.places(np.array([slot]))
                assert (segments[0], (offsets[0], generations[0])) == page

    @rule(space=spaces, keys=key_lists)
    def match(self, space: bytes, keys: list[bytes]) -> None:
        slots = self.index.match(space, b"".join(keys))
        count = 0
        while count < len(keys) and self._reachable(space, keys[count]):
            count += 1
        assert len(slots) == count
        segments, offsets, generations = self.index.places(slots)
        expected = [self.pages[space, name] for name in keys[:count]]
        assert [(s, (o, g)) for s, o, g in zip(segments, offsets, generations, strict=True)] == expected

    @rule(space=spaces, keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True))
    def read(self, space: bytes, keys: list[bytes]) -> None:
        slots = self.index.match(space, b"".join(keys))
        self.index.touch(slots)
        self.index.pin(slots)
        names = [(space, name) for name in keys[: len(slots)]]
        self._touched(names)
        self.pins.append((names, slots))

    @precondition(lambda self: self.pins)
    @rule()
    def finish_reading(self) -> None:
        _, slots = self.pins.pop(0)
        self.index.unpin(slots)

    @rule(segment=st.sampled_from([0, 1]), pages=st.integers(0, 4))
    def evict(self, segment: int, pages: int) -> None:
        slots = self.index.coldest(segment, pages * PAGE_BYTES)
        pinned = {name for names, _ in self.pins for name in names}
        coldest = [n for n, (where, _) in self.pages.items() if where == segment and n not in pinned][:pages]
        removed = self.index.remove(slots)
        expected = [self.pages.pop(name)[1] for name in coldest]
        assert [tuple(e) for e in removed.extents.tolist()] == expected, "exactly the least recently used"
        assert not removed.pinned.any()

    @rule(space=spaces, name=st.sampled_from(KEYS))
    def remove_one(self, space: bytes, name: bytes) -> None:
        segment, (offset, generation) = self.pages.get((space, name), (0, (-1, -1)))
        slots = self.index.at(space, name, segment, offset, generation)
        assert len(slots) == ((space, name) in self.pages)
        self.index.remove(slots)
        self.pages.pop((space, name), None)
        # A lease on it stays a lease on what it was, also if the key comes back elsewhere.
        self.pins = [([n for n in names if n != (space, name)], slots) for names, slots in self.pins]

    @rule(segment=st.sampled_from([0, 1]))
    def switch_reachable(self, segment: int) -> None:
        self.reachable[segment] = not self.reachable[segment]
        self.index.set_available(segment, self.reachable[segment])

    @invariant()
    def counts_are_exact(self) -> None:
        assert self.index.num_blocks == len(self.pages)
        assert self.index.bytes_committed == len(self.pages) * PAGE_BYTES
        for space in SPACES:
            absent = self.index.absent(space, b"".join(KEYS))
            assert absent == [i for i, name in enumerate(KEYS) if not self._reachable(space, name)]

    def _reachable(self, space: bytes, name: bytes) -> bool:
        return (space, name) in self.pages and self.reachable[self.pages[space, name][0]]

    def _touched(self, names: list[tuple[bytes, bytes]]) -> None:
        for name in reversed(names):
            self.pages[name] = self.pages.pop(name)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_block_costs_at_most_200_bytes_or_so() -> None:
    index = BlockIndex()
    index.set_available(0, True)
    pages, run = 100_000, 200
    for start in range(0, pages, run):
        keys = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(start, start + run))
        index.insert(SPACES[0], keys, 0, np.arange(2 * run, dtype=np.int64).reshape(run, 2), PAGE_BYTES)
    assert index.num_blocks == pages
    assert index.size_bytes / pages <= 220
