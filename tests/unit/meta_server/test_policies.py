"""What goes first: enough and no page twice under every policy, later blocks before earlier ones, worth before age."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meta_server.index import BlockIndex
from meta_server.page_arrays import ExtentArray
from meta_server.policies import make_policy
from stratakv.keys import KEY_BYTES
from stratakv.settings import EvictionPolicy

NAMESPACE, OTHER = b"n" * 16, b"o" * 16
PAGE_BYTES = 4096
ALL = list(EvictionPolicy)


class Segment:
    """Pages of one segment under a policy, by number in the order they came."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.index = BlockIndex(make_policy(policy))
        self.index.set_available(0, True)
        self.keys: list[bytes] = []
        self.namespaces: list[bytes] = []

    def put(self, count: int, namespace: bytes = NAMESPACE, keys: bytes = b"") -> list[int]:
        """A run of consecutive blocks."""
        keys = keys or os.urandom(KEY_BYTES * count)
        first = len(self.keys)
        numbers = list(range(first, first + count))
        extents: ExtentArray = np.array([(number * PAGE_BYTES, number) for number in numbers], np.int64)
        self.index.insert(namespace, keys, 0, extents, PAGE_BYTES)
        self.keys += [keys[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in range(count)]
        self.namespaces += [namespace] * count
        return numbers

    def read(self, numbers: list[int]) -> None:
        """As a reader does, from the first block of a prefix on."""
        slots = self.index.match(self.namespaces[numbers[0]], b"".join(self.keys[number] for number in numbers))
        assert len(slots) == len(numbers)
        self.index.touch(slots)
        self.index.count_read(slots)

    def evict(self, count: int) -> list[int]:
        slots = self.index.coldest(0, count * PAGE_BYTES)
        removed = self.index.remove(slots)
        return [int(generation) for generation in removed.extents[:, 1]]


@given(
    policy=st.sampled_from(ALL),
    steps=st.lists(st.tuples(st.sampled_from(["put", "read", "evict"]), st.integers(1, 9)), max_size=40),
)
def test_as_much_is_freed_as_is_asked_for_and_nothing_twice(
    policy: EvictionPolicy, steps: list[tuple[str, int]]
) -> None:
    segment = Segment(policy)
    runs: list[list[int]] = []
    there: set[int] = set()
    for action, count in steps:
        if action == "put":
            runs.append(segment.put(count))
            there.update(runs[-1])
        elif action == "read" and runs:
            run = runs[count % len(runs)]
            whole = [number for number in run if number in there]
            if whole and whole == run[: len(whole)]:
                segment.read(whole)
        elif action == "evict":
            gone = segment.evict(count)
            assert len(gone) == len(set(gone)) == min(count, len(there))
            assert set(gone) <= there
            there -= set(gone)
            for run in runs:
                left = [number in there for number in run]
                assert left == sorted(left, reverse=True), "an earlier block went before a later one"
    assert segment.index.num_blocks == len(there)


@pytest.mark.parametrize("policy", ALL)
def test_pages_that_are_read_outlive_pages_that_are_not(policy: EvictionPolicy) -> None:
    segment = Segment(policy)
    read, unread = segment.put(4), segment.put(4)
    segment.read(read)
    assert set(segment.evict(4)) == set(unread)


@pytest.mark.parametrize("policy", [EvictionPolicy.COST, EvictionPolicy.LFU, EvictionPolicy.S3FIFO])
def test_a_scan_does_not_push_out_what_is_read_often(policy: EvictionPolicy) -> None:
    segment = Segment(policy)
    hot = segment.put(4)
    for _ in range(4):
        segment.read(hot)
    scanned = [number for _ in range(3) for number in segment.put(4)]
    assert set(segment.evict(8)) <= set(scanned)


def test_a_scan_pushes_out_what_is_older_under_lru() -> None:
    segment = Segment(EvictionPolicy.LRU)
    hot = segment.put(4)
    segment.read(hot)
    segment.put(8)
    assert set(segment.evict(4)) == set(hot)


def test_dear_pages_outlive_cheap_ones_by_a_turnover_for_each_doubling() -> None:
    segment = Segment(EvictionPolicy.COST)
    dear = segment.put(4)
    cheap = segment.put(4, OTHER)
    segment.index.learn_cost(NAMESPACE, 8.0)
    segment.index.learn_cost(OTHER, 1.0)
    assert set(segment.evict(4)) == set(cheap), "though they came later"
    for _ in range(8):
        segment.put(4, OTHER)
    assert set(dear) <= set(segment.evict(20)), "in the end they are too old"


def test_what_comes_again_soon_after_it_was_given_up_is_not_taken_for_a_scan() -> None:
    segment = Segment(EvictionPolicy.S3FIFO)
    keys = os.urandom(KEY_BYTES * 2)
    segment.put(2, keys=keys)
    others = segment.put(2)
    assert len(segment.evict(2)) == 2
    again = segment.put(2, keys=keys)
    segment.put(6)
    gone = segment.evict(6)
    assert not set(again) & set(gone)
    assert set(gone) & set(others) or len(gone) == 6


def test_a_namespace_that_is_kept_stays() -> None:
    segment = Segment(EvictionPolicy.COST)
    kept = segment.put(4)
    segment.index.keep(NAMESPACE, True)
    other = segment.put(4, OTHER)
    assert set(segment.evict(100)) == set(other)
    segment.index.keep(NAMESPACE, False)
    assert set(segment.evict(100)) == set(kept)
