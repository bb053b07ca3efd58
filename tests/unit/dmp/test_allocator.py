"""The allocator against a model: used bytes equal live extents, nothing overlaps, free space is whole again after freeing."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dmp.allocator import ExtentAllocator
from dmp.errors import ExtentNotLive
from stratakv.layout import ALIGNMENT_BYTES
from stratakv.pool.errors import SegmentFull
from stratakv.wire import Extent

UNITS = 64


class AllocatorModel(RuleBasedStateMachine):
    """Random batches and frees; the model is the list of what was handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator(UNITS * ALIGNMENT_BYTES)
        self.live: dict[Extent, int] = {}
        self.dead: list[Extent] = []

    @rule(count=st.integers(1, 12), units=st.integers(1, 7))
    def allocate(self, count: int, units: int) -> None:
        size = units * ALIGNMENT_BYTES
        before = self.allocator.free_runs()
        fits = sum(run // size for run in before.values()) >= count
        try:
            extents = self.allocator.allocate(count, size)
        except SegmentFull:
            assert not fits
            assert self.allocator.free_runs() == before
            return
        assert fits
        assert len(set(extents)) == len(extents) == count
        if any(run >= count * size for run in before.values()):
            offsets = [e.offset for e in extents]
            assert offsets == list(range(offsets[0], offsets[0] + count * size, size))
        self.live.update(dict.fromkeys(extents, size))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        extent = data.draw(st.sampled_from(sorted(self.live, key=lambda e: e.offset)))
        self.allocator.free(extent)
        del self.live[extent]
        self.dead.append(extent)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def free_again(self, data: st.DataObject) -> None:
        with pytest.raises(ExtentNotLive):
            self.allocator.free(data.draw(st.sampled_from(self.dead)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), step=st.integers(1, 3))
    def free_of_another_generation(self, data: st.DataObject, step: int) -> None:
        extent = data.draw(st.sampled_from(sorted(self.live, key=lambda e: e.offset)))
        with pytest.raises(ExtentNotLive):
            self.allocator.free(Extent(extent.offset, extent.generation + step))

    @invariant()
    def used_is_live(self) -> None:
        assert self.allocator.used_bytes == sum(self.live.values())
        assert dict(self.allocator.live()) == self.live

    @invariant()
    def memory_is_tiled_and_free_runs_are_maximal(self) -> None:
        free = self.allocator.free_runs()
        tiles = sorted(
            [(e.offset, size, False) for e, size in self.live.items()] + [(*run, True) for run in free.items()]
        )
        at, was_free = 0, False
        for offset, size, is_free in tiles:
            assert offset == at
            assert not (is_free and was_free)
            at, was_free = offset + size, is_free
        assert at == self.allocator.size_bytes


TestAllocator = AllocatorModel.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_scattered_batch_is_taken_from_as_few_runs_as_possible() -> None:
    allocator = ExtentAllocator(10 * ALIGNMENT_BYTES)
    extents = allocator.allocate(10, ALIGNMENT_BYTES)
    for index in (0, 2, 3, 4, 8):
        allocator.free(extents[index])
    offsets = [e.offset // ALIGNMENT_BYTES for e in allocator.allocate(4, ALIGNMENT_BYTES)]
    assert offsets[:3] == [2, 3, 4]
    assert offsets[3] in (0, 8)


def test_extents_start_and_stride_on_the_alignment() -> None:
    allocator = ExtentAllocator(1 << 21)
    assert all(e.offset % ALIGNMENT_BYTES == 0 for e in allocator.allocate(3, 5 * ALIGNMENT_BYTES))
    with pytest.raises(ValueError, match="multiples"):
        allocator.allocate(1, ALIGNMENT_BYTES + 1)
