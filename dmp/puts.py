"""The daemon's table of unfinished puts, and the way of every extent from allocation to free.

    allocate ──▶ OPEN ──timeout, release──▶ UNDECIDED ──meta server: committed──▶ the index's ──order──▶ grace ──▶ free
                                                └────── meta server: void ────────────────────────────────────▶ free

A put is known by its put_id, so every request may be sent again. Only the meta server's word frees bytes: a writer that gives
up may have missed the answer to a commit that holds. Bytes of a put are not freed while a connection is writing into them.
Thread-safe: called by connection threads and by the heartbeat; the clock is handed in.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmp.allocator import ExtentAllocator
from stratakv._native import Entered, make_grants
from stratakv.pool.errors import OutOfBounds, PutRefused, SegmentFull
from stratakv.wire import Extent

PUTS_MAX = 65_536
"""Unfinished puts at once."""
CLOSED_PUTS_MAX = 20_000
"""Puts that are over and still remembered, so that a late duplicate does not allocate again."""
FREE_GRACE_S = 1.0
"""Between the order to free an extent and its reuse: a reader that has just lost its lease may still be copying."""
UNDECIDED_PER_HEARTBEAT_MAX = 1_000
FREED_PER_HEARTBEAT_MAX = 20_000


@dataclass(slots=True)
class _Put:
    extents: list[Extent]
    page_bytes: int
    deadline: float
    is_released: bool = False
    """The writer gave up: no further writes, and the meta server is asked at once."""

    def runs(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Starts and ends of the runs of consecutive extents, ascending."""
        offsets = np.sort(np.array([e.offset for e in self.extents], dtype=np.uint64))
        after = offsets + np.uint64(self.page_bytes)
        breaks = offsets[1:] != after[:-1]
        starts = offsets[np.concatenate(([True], breaks))]
        return starts, after[np.concatenate((breaks, [True]))]


class PutTable:
    """All unfinished puts of one segment."""

    def __init__(self, allocator: ExtentAllocator, clock: Callable[[], float]) -> None:
        self._allocator = allocator
        self._clock = clock
        self.grants = make_grants()
        """Who may write where just now; told by this table only."""
        self._lock = threading.Lock()
        self._puts: dict[bytes, _Put] = {}
        self._put_of_extent: dict[Extent, bytes] = {}
        self._closed: OrderedDict[bytes, None] = OrderedDict()
        self._in_grace: dict[Extent, float] = {}
        """Ordered free, not yet due; in the order they fall due."""
        self._freed: dict[Extent, None] = {}
        """Freed by order, not yet reported."""
        self.limit_bytes = 0
        """What the meta server lets this segment use; 0: all of it."""

    @property
    def num_open(self) -> int:
        return len(self._puts)

    @property
    def used_bytes(self) -> int:
        return self._allocator.used_bytes

    @property
    def num_extents(self) -> int:
        return self._allocator.num_extents

    def allocate(self, put_id: bytes, count: int, page_bytes: int, timeout_s: float) -> list[Extent]:
        """The put's extents; the same ones when asked again. Raises SegmentFull, PutRefused."""
        with self._lock:
            put = self._puts.get(put_id)
            if put is not None:
                if (len(put.extents), put.page_bytes) != (count, page_bytes) or put.is_released:
                    raise PutRefused("this put was asked for with another shape, or is given up")
                return put.extents
            if put_id in self._closed:
                raise PutRefused("this put is over")
            if len(self._puts) >= PUTS_MAX:
                raise SegmentFull(f"{PUTS_MAX} puts are unfinished already")
            extents = self._allocator.allocate(count, page_bytes)
            put = self._puts[put_id] = _Put(extents, page_bytes, self._clock() + timeout_s)
            self.grants.open(put_id, *put.runs(), put.deadline)
            self._put_of_extent.update(dict.fromkeys(extents, put_id))
            return extents

    def is_live(self, extent: Extent) -> bool:
        """Whether exactly this allocation is in use."""
        with self._lock:
            return self._allocator.is_live(extent)

    def release(self, put_id: bytes) -> None:
        """The writer gives up, or the put never came to be; freed when the meta server calls it void. Idempotent."""
        with self._lock:
            put = self._puts.get(put_id)
            if put is None:
                self._close(put_id)
            else:
                put.is_released = True
                self.grants.close(put_id)

    @contextmanager
    def writing(self, put_id: bytes, offsets: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint32]) -> Iterator[None]:
        """Hold the put's memory while its ranges are written. Raises PutRefused, OutOfBounds."""
        entered = self.grants.enter(put_id, offsets, sizes, self._clock())
        if entered == Entered.REFUSED:
            raise PutRefused("this put is unknown, over or out of time")
        if entered == Entered.OUTSIDE:
            raise OutOfBounds("a range lies outside the pages of its put")
        try:
            yield
        finally:
            self.grants.leave(put_id)

    def undecided(self) -> list[bytes]:
        """Puts that nobody may write to any more, oldest first: the meta server knows how they ended."""
        now = self._clock()
        with self._lock:
            over = [put_id for put_id, put in self._puts.items() if put.is_released or put.deadline < now]
        return over[:UNDECIDED_PER_HEARTBEAT_MAX]

    def commit(self, put_ids: Sequence[bytes]) -> None:
        """These puts are finished: their extents belong to the index now. Idempotent."""
        with self._lock:
            for put_id in put_ids:
                self._forget(put_id)

    def void(self, put_ids: Sequence[bytes]) -> None:
        """These puts will never be finished: free their extents, except where a write still runs (asked again then)."""
        with self._lock:
            for put_id in put_ids:
                put = self._puts.get(put_id)
                if put is not None and self.grants.close(put_id):
                    self._forget(put_id)
                    for extent in put.extents:
                        self._allocator.free(extent)

    def order_free(self, extents: Sequence[Extent]) -> None:
        """The index has dropped these: free each after a grace. Idempotent; old generations count as freed already."""
        due = self._clock() + FREE_GRACE_S
        with self._lock:
            for extent in extents:
                # Only what was committed is ever in an index, so the put is decided.
                put_id = self._put_of_extent.get(extent)
                if put_id is not None:
                    self._forget(put_id)
                if not self._allocator.is_live(extent):
                    self._freed[extent] = None
                else:
                    self._in_grace.setdefault(extent, due)

    def free_due(self) -> None:
        """Free what has outlived its grace."""
        now = self._clock()
        with self._lock:
            due = []
            for extent, due_at in self._in_grace.items():
                if due_at > now:
                    break
                due.append(extent)
            for extent in due:
                del self._in_grace[extent]
                self._allocator.free(extent)
                self._freed[extent] = None

    def give_back(self, start: int, size_bytes_max: int, remove: Callable[[int, int], None]) -> int | None:
        """Have `remove` take the memory of free bytes at `start` and behind it; where to go on, None at the end.

        Nothing is allocated meanwhile, so it is done in parts.
        """
        left = size_bytes_max
        with self._lock:
            for at, size in self._allocator.free_runs_from(start):
                remove(at, min(size, left))
                left -= size
                if left <= 0:
                    return at + size + min(left, 0)
        return None

    def freed(self) -> list[Extent]:
        """Freed by order and not yet confirmed as reported, oldest first."""
        with self._lock:
            return [extent for extent, _ in zip(self._freed, range(FREED_PER_HEARTBEAT_MAX), strict=False)]

    def confirm_freed(self, reported: Sequence[Extent]) -> None:
        """The meta server has heard of these."""
        with self._lock:
            for extent in reported:
                self._freed.pop(extent, None)

    def _close(self, put_id: bytes) -> None:
        self._closed[put_id] = None
        if len(self._closed) > CLOSED_PUTS_MAX:
            self._closed.popitem(last=False)

    def _forget(self, put_id: bytes) -> None:
        """The put is decided; its extents stay."""
        put = self._puts.pop(put_id, None)
        if put is not None:
            self.grants.close(put_id)
            self._close(put_id)
            for extent in put.extents:
                del self._put_of_extent[extent]
