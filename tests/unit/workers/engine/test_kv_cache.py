"""The books of the paged cache hold after any sequence of operations: free + cached + referenced = total."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stratakv.keys import BlockKey
from workers.engine.block_table import BlockTable, Run
from workers.engine.config import EngineDtype
from workers.engine.errors import CacheCorrupt
from workers.engine.kv_cache import KVCache
from workers.engine.model_config import ModelFacts

NUM_BLOCKS = 13
FACTS = ModelFacts(
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=9,
    max_model_len=64,
    eos_token_ids=frozenset(),
    dtype=EngineDtype.FP32,
)


def new_cache(num_blocks: int = NUM_BLOCKS) -> KVCache:
    return KVCache(FACTS, num_blocks, 4, torch.device("cpu"))


def key(number: int) -> BlockKey:
    return BlockKey(hashlib.sha256(bytes([number])).digest())


class CacheBooks(RuleBasedStateMachine):
    """Sequences hold blocks, register them under keys of a small alphabet, and let go of them, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache()
        self.held: list[list[int]] = []

    @rule(num_blocks=st.integers(1, 6), growth=st.integers(0, 4), follow=st.booleans())
    def allocate(self, num_blocks: int, growth: int, follow: bool) -> None:
        after = self.held[-1][-1] if follow and self.held else None
        available = self.cache.num_available
        blocks = self.cache.allocate(num_blocks, after, growth)
        assert (blocks is None) == (num_blocks > available)
        if blocks is not None:
            assert len(set(blocks)) == num_blocks
            assert not set(blocks) & {block for held in self.held for block in held}
            self.held.append(blocks)

    @rule(first=st.integers(0, 20), data=st.data())
    def register(self, first: int, data: st.DataObject) -> None:
        if self.held:
            for index, block in enumerate(data.draw(st.sampled_from(self.held))):
                self.cache.register(key(first + index), block)

    @rule(first=st.integers(0, 20), length=st.integers(1, 5))
    def match_and_reference(self, first: int, length: int) -> None:
        blocks = self.cache.match([key(first + index) for index in range(length)])
        if blocks:
            self.cache.reference(blocks)
            self.held.append(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            self.cache.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def drop(self) -> None:
        cached = self.cache.use.cached
        assert self.cache.drop_unreferenced() == cached
        assert self.cache.use.cached == 0

    @invariant()
    def books_are_whole(self) -> None:
        self.cache.check()
        use = self.cache.use
        assert use.free + use.cached + use.referenced == use.total == NUM_BLOCKS
        assert use.referenced == len({block for held in self.held for block in held})


CacheBooks.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestCacheBooks = CacheBooks.TestCase


def test_blocks_are_handed_out_as_runs_and_grow_in_place() -> None:
    cache = new_cache(64)
    first = cache.allocate(3, None, expected_growth=4)
    second = cache.allocate(3, None, expected_growth=4)
    assert first == [0, 1, 2]
    assert second == [7, 8, 9]
    assert cache.allocate(2, first[-1], expected_growth=2) == [3, 4]


def test_set_aside_blocks_are_given_rather_than_refusing() -> None:
    cache = new_cache(6)
    assert cache.allocate(2, None, expected_growth=4) == [0, 1]
    assert cache.allocate(4, None, expected_growth=0) == [2, 3, 4, 5]


def test_the_end_of_a_prefix_is_evicted_before_its_start() -> None:
    cache = new_cache(4)
    blocks = cache.allocate(4, None)
    assert blocks is not None
    for number, block in enumerate(blocks):
        cache.register(key(number), block)
    cache.release(blocks)
    cache.allocate(2, None)
    assert cache.num_cached([key(number) for number in range(4)]) == 2


def test_what_had_to_go_for_want_of_room_is_counted_with_its_age() -> None:
    now = 100.0
    cache = KVCache(FACTS, 4, 4, torch.device("cpu"), clock=lambda: now)
    blocks = cache.allocate(4, None)
    assert blocks is not None
    for number, block in enumerate(blocks):
        cache.register(key(number), block)
    cache.release(blocks[:1])
    now = 110.0
    cache.release(blocks[1:])
    now = 130.0
    cache.allocate(2, None)
    assert (cache.num_evicted, cache.evicted_age_s) == (2, 30.0 + 20.0)
    cache.drop_unreferenced()
    assert cache.num_evicted == 2, "dropped at somebody's word"


def test_a_double_release_is_found() -> None:
    cache = new_cache()
    blocks = cache.allocate(1, None)
    assert blocks is not None
    cache.release(blocks)
    with pytest.raises(CacheCorrupt):
        cache.release(blocks)


def test_a_block_table_reads_consecutive_blocks_as_one_run() -> None:
    table = BlockTable(4)
    table.extend([5, 6, 7])
    table.extend([8, 2])
    assert table.slot_runs(0, 18) == [Run(20, 16), Run(8, 2)]
    assert table.slot_runs(3, 5) == [Run(23, 2)]
    assert table.slot_runs(15, 17) == [Run(35, 1), Run(8, 1)]
    assert table.take_from(3) == [8, 2]
    assert table.slot_runs(0, 12) == [Run(20, 12)]
