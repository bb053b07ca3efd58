"""The put table: idempotent by put_id, freed only on the meta server's word, reported until heard."""

from __future__ import annotations

import numpy as np
import pytest

from dmp.allocator import ExtentAllocator
from dmp.puts import FREE_GRACE_S, PutTable
from stratakv.layout import ALIGNMENT_BYTES
from stratakv.pool.errors import OutOfBounds, PutRefused, SegmentFull
from stratakv.wire import Extent

PAGE = 2 * ALIGNMENT_BYTES
PUT = b"p" * 16


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def puts(clock: Clock) -> PutTable:
    return PutTable(ExtentAllocator(16 * PAGE), clock)


def write(puts: PutTable, put_id: bytes, offset: int, size: int) -> None:
    with puts.writing(put_id, np.array([offset], dtype=np.uint64), np.array([size], dtype=np.uint32)):
        pass


def test_a_repeated_allocate_gives_the_same_extents(puts: PutTable) -> None:
    first = puts.allocate(PUT, 3, PAGE, 1.0)
    assert puts.allocate(PUT, 3, PAGE, 1.0) == first
    assert puts.used_bytes == 3 * PAGE
    with pytest.raises(PutRefused):
        puts.allocate(PUT, 4, PAGE, 1.0)


def test_a_batch_that_does_not_fit_leaves_nothing(puts: PutTable) -> None:
    with pytest.raises(SegmentFull):
        puts.allocate(PUT, 17, PAGE, 1.0)
    assert (puts.used_bytes, puts.num_open) == (0, 0)


def test_an_expired_put_is_asked_about_until_the_answer_and_freed_when_void(puts: PutTable, clock: Clock) -> None:
    puts.allocate(PUT, 3, PAGE, 1.0)
    assert puts.undecided() == []
    clock.now = 2.0
    assert puts.undecided() == [PUT] == puts.undecided()
    puts.void([PUT])
    puts.void([PUT])
    assert (puts.used_bytes, puts.num_open) == (0, 0)


def test_a_committed_put_keeps_its_bytes(puts: PutTable, clock: Clock) -> None:
    puts.allocate(PUT, 3, PAGE, 1.0)
    clock.now = 2.0
    puts.commit([PUT])
    puts.void([PUT])
    assert (puts.used_bytes, puts.num_open) == (3 * PAGE, 0)


def test_a_released_put_is_asked_about_at_once_and_takes_no_more_bytes(puts: PutTable) -> None:
    offset = puts.allocate(PUT, 1, PAGE, 60.0)[0].offset
    puts.release(PUT)
    puts.release(PUT)
    assert puts.undecided() == [PUT]
    assert puts.used_bytes == PAGE
    with pytest.raises(PutRefused):
        write(puts, PUT, offset, PAGE)


def test_a_late_duplicate_of_a_finished_put_allocates_nothing(puts: PutTable) -> None:
    puts.allocate(PUT, 1, PAGE, 1.0)
    puts.release(PUT)
    puts.void([PUT])
    puts.release(b"q" * 16)
    for late in (PUT, b"q" * 16):
        with pytest.raises(PutRefused):
            puts.allocate(late, 1, PAGE, 1.0)
    assert puts.used_bytes == 0


def test_writes_stay_within_the_pages_of_their_put(puts: PutTable) -> None:
    puts.allocate(b"other" + bytes(11), 1, PAGE, 1.0)
    start = puts.allocate(PUT, 2, PAGE, 1.0)[0].offset
    write(puts, PUT, start, 2 * PAGE)
    for offset, size in ((start - 1, 2), (start + 2 * PAGE - 1, 2), (start + 2 * PAGE, 1), (0, PAGE)):
        with pytest.raises(OutOfBounds):
            write(puts, PUT, offset, size)


def test_an_expired_put_takes_no_more_bytes(puts: PutTable, clock: Clock) -> None:
    offset = puts.allocate(PUT, 1, PAGE, 1.0)[0].offset
    clock.now = 1.5
    with pytest.raises(PutRefused):
        write(puts, PUT, offset, 1)


def test_bytes_are_not_freed_while_they_are_written(puts: PutTable, clock: Clock) -> None:
    offset = puts.allocate(PUT, 1, PAGE, 1.0)[0].offset
    with puts.writing(PUT, np.array([offset], dtype=np.uint64), np.array([1], dtype=np.uint32)):
        clock.now = 2.0
        puts.void([PUT])
        assert puts.used_bytes == PAGE
        assert puts.undecided() == [PUT]
    puts.void([PUT])
    assert puts.used_bytes == 0


def test_ordered_extents_are_freed_after_the_grace_and_reported_until_confirmed(puts: PutTable, clock: Clock) -> None:
    extents = puts.allocate(PUT, 3, PAGE, 1.0)
    puts.commit([PUT])
    puts.order_free(extents[:2])
    puts.order_free(extents[:2])
    puts.free_due()
    assert (puts.used_bytes, puts.freed()) == (3 * PAGE, [])
    clock.now = FREE_GRACE_S
    puts.free_due()
    assert (puts.used_bytes, puts.freed()) == (PAGE, extents[:2])
    puts.confirm_freed(extents[:2])
    assert puts.freed() == []


def test_an_order_for_a_freed_or_reused_extent_is_only_reported(puts: PutTable, clock: Clock) -> None:
    old = puts.allocate(PUT, 16, PAGE, 1.0)[0]
    puts.order_free([old])
    clock.now = FREE_GRACE_S
    puts.free_due()
    puts.confirm_freed([old])
    new = puts.allocate(b"n" * 16, 1, PAGE, 1.0)[0]
    assert new.offset == old.offset
    assert new.generation > old.generation
    puts.order_free([old, Extent(old.offset, 0)])
    clock.now = 5 * FREE_GRACE_S
    puts.free_due()
    assert puts.used_bytes == 16 * PAGE
    assert set(puts.freed()) == {old, Extent(old.offset, 0)}


def test_an_order_for_pages_of_an_undecided_put_means_that_it_was_committed(puts: PutTable, clock: Clock) -> None:
    extents = puts.allocate(PUT, 2, PAGE, 60.0)
    puts.order_free(extents[:1])
    clock.now = FREE_GRACE_S
    puts.free_due()
    assert puts.used_bytes == PAGE
    assert puts.num_open == 0


@pytest.mark.parametrize("part_bytes", [ALIGNMENT_BYTES, 3 * PAGE, 100 * PAGE])
def test_the_memory_of_all_that_is_free_is_given_back_in_parts(puts: PutTable, clock: Clock, part_bytes: int) -> None:
    extents = puts.allocate(PUT, 10, PAGE, 1.0)
    puts.commit([PUT])
    puts.order_free([extents[i] for i in (0, 3, 4, 9)])
    clock.now += FREE_GRACE_S
    puts.free_due()
    removed: list[int] = []

    def remove(start: int, size: int) -> None:
        assert size <= part_bytes
        removed.extend(range(start, start + size, ALIGNMENT_BYTES))

    at: int | None = 0
    while at is not None:
        at = puts.give_back(at, part_bytes, remove)
    kept = {extents[i].offset + half for i in (1, 2, 5, 6, 7, 8) for half in (0, ALIGNMENT_BYTES)}
    assert sorted(removed) == [at for at in range(0, 16 * PAGE, ALIGNMENT_BYTES) if at not in kept]
