"""Transport between processes of one host: the daemon's memory, mapped. Copies are made by the caller's thread.

The daemon cannot see these writes, so this side keeps to the put's time itself; what slips through (a process frozen in the
middle of a copy) is found by the reader's checksums.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import os
import select
import socket
import threading
import weakref
from collections.abc import Callable, Sequence

from stratakv import _native
from stratakv._native import Ended, Gate, PageHeaders
from stratakv._native.base import UInt64s
from stratakv.pool.ends import check_end
from stratakv.pool.errors import OutOfBounds, TransportError
from stratakv.pool.framing import remaining_s
from stratakv.pool.headers import require_headers, write_headers
from stratakv.pool.populate import populate
from stratakv.pool.put_times import PutTimes
from stratakv.pool.transport import Buffer, Cancellation, PageBatch

STEP_BYTES = 1024 * 1024
"""Deadline, cancellation and the daemon's life are looked at after so many bytes."""
STEP_RANGES = 256


class ShmTransport:
    """One segment, mapped; `control` is the socket whose other end dies with the daemon."""

    def __init__(self, fd: int, size_bytes: int, control: socket.socket, *, populates: bool = True) -> None:
        """`populates`: bring the whole mapping in ahead of its use."""
        self._control = control
        # Watched by transfers without the interpreter lock, so it must stay this socket for as long as one of them runs.
        self._watch_fd = os.dup(control.fileno())
        weakref.finalize(self, os.close, self._watch_fd)
        self._map = mmap.mmap(fd, size_bytes)
        self._closed = False
        if populates:
            threading.Thread(
                target=populate, args=(self._map, lambda: self._closed), name="shm-populate", daemon=True
            ).start()
        self._memory = memoryview(self._map)
        self._put_times = PutTimes()

    def read_batch(
        self,
        ranges: Sequence[tuple[int, memoryview]],
        *,
        deadline: float,
        on_range: Callable[[int], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        self._check_offsets(ranges)
        for start, stop in _steps([len(into) for _, into in ranges]):
            self._check(deadline, cancellation)
            try:
                for offset, into in ranges[start:stop]:
                    into[:] = self._memory[offset : offset + len(into)]
            except ValueError as error:
                raise self._fault(error) from error
            if on_range is not None:
                on_range(stop)
        self._check(deadline, cancellation)

    def write_batch(
        self,
        put_id: bytes,
        ranges: Sequence[tuple[int, Buffer]],
        *,
        deadline: float,
        cancellation: Cancellation | None = None,
    ) -> None:
        self._check_offsets(ranges)
        for start, stop in _steps([len(source) for _, source in ranges]):
            self._check(deadline, cancellation)
            self._put_times.check(put_id)
            try:
                for offset, source in ranges[start:stop]:
                    self._memory[offset : offset + len(source)] = source
            except ValueError as error:
                raise self._fault(error) from error
        self._check(deadline, cancellation)

    def read_pages(
        self,
        batch: PageBatch,
        checksums: UInt64s,
        *,
        deadline: float,
        done: Gate,
        cancellation: Cancellation | None = None,
        headers: PageHeaders | None = None,
    ) -> None:
        what = batch.offsets, headers, checksums
        require_headers(self.read_batch, *what, deadline=deadline, cancellation=cancellation)
        with (cancellation or Cancellation()).stopping(done.close):
            how = self._move(_native.moves.read_pages, batch, checksums, done, deadline)
        check_end(how, batch, "the daemon has gone; what its memory held is void")

    def write_pages(
        self,
        put_id: bytes,
        batch: PageBatch,
        checksums: UInt64s,
        *,
        deadline: float,
        ready: Gate,
        headers: PageHeaders | None = None,
    ) -> None:
        put_deadline = self._put_times.deadline(put_id)
        how = self._move(_native.moves.write_pages, batch, checksums, ready, min(deadline, put_deadline))
        if how[0] == Ended.LATE and put_deadline < deadline:
            self._put_times.check(put_id)
        check_end(how, batch, "the daemon has gone; what its memory held is void")
        write_headers(self.write_batch, put_id, batch.offsets, headers, checksums, deadline=deadline)

    def mapping(self) -> memoryview | None:
        return self._memory

    def put_opened(self, put_id: bytes, deadline: float) -> None:
        self._put_times.opened(put_id, deadline)

    def put_closed(self, put_id: bytes) -> None:
        self._put_times.closed(put_id)

    def close(self) -> None:
        self._closed = True
        try:
            self._memory.release()
            self._map.close()
        except BufferError:
            # Somebody still holds a view of the mapping; it goes with the last of them.
            return

    def _move(
        self, move: _Move, batch: PageBatch, checksums: UInt64s, gate: Gate, deadline: float
    ) -> tuple[int, int, int]:
        try:
            return move(
                self._memory, batch.offsets, batch.layers, batch.rows, checksums, gate, self._watch_fd, deadline
            )
        except ValueError as error:
            raise self._fault(error) from error

    def _check(self, deadline: float, cancellation: Cancellation | None) -> None:
        remaining_s(deadline)
        if cancellation is not None:
            cancellation.check()
        # One for each call: several threads look at the same socket, and may not share it.
        hangup = select.poll()
        hangup.register(self._watch_fd, select.POLLRDHUP)
        if self._control.fileno() < 0 or hangup.poll(0):
            raise TransportError("the daemon has gone; what its memory held is void")

    def _check_offsets(self, ranges: Sequence[tuple[int, object]]) -> None:
        if ranges and min(ranges, key=_offset)[0] < 0:
            raise OutOfBounds("a range starts before the segment")

    def _fault(self, error: ValueError) -> Exception:
        """A slice came out short, or another thread has closed this transport."""
        if self._control.fileno() < 0:
            return TransportError("the connection was closed")
        return OutOfBounds(f"a range lies outside the segment: {error}")


_Move = Callable[..., tuple[int, int, int]]


def _offset(item: tuple[int, object]) -> int:
    return item[0]


def _steps(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive index ranges of at least one range each."""
    ends = list(itertools.accumulate(sizes))
    steps, start = [], 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = bisect.bisect_right(ends, before + STEP_BYTES, start + 1, min(start + STEP_RANGES, len(ends)))
        steps.append((start, stop))
        start = stop
    return steps


def received_memory(fds: Sequence[int], size_bytes: int) -> int:
    """The one descriptor that came with `Attached`, checked. Raises TransportError and closes what came."""
    if len(fds) == 1 and os.fstat(fds[0]).st_size == size_bytes:
        return fds[0]
    for fd in fds:
        os.close(fd)
    raise TransportError("the daemon handed over no memory of the size it told")
