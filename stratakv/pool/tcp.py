"""Transport over TCP: a few sockets, each carrying one batch at a time, requests sent ahead of the data.

A batch travels as few large frames with packed ranges; adjacent ranges are merged before they are sent, and received straight
into their destinations.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt

from stratakv import _native
from stratakv._native import Ended, Gate, PageHeaders
from stratakv._native.base import UInt64s
from stratakv.pool import messages
from stratakv.pool.control import parse_reply, receive_reply, shut
from stratakv.pool.ends import check_end
from stratakv.pool.errors import OutOfBounds, ProtocolMismatch, TransportError, TransportTimeout
from stratakv.pool.framing import is_hung_up, receive_all, receive_header, remaining_s, send_all
from stratakv.pool.messages import FRAME, RANGE_DTYPE, FrameKind, MalformedFrame, frame_header, parse_frame_header
from stratakv.pool.page_ranges import read_by_ranges, write_by_ranges
from stratakv.pool.transport import Buffer, Cancellation, PageBatch

SOCKETS_MAX = 4
"""Sockets in use at once; further batches wait for one."""
LANES_MAX = 2
"""Sockets that share one batch."""
LANE_BYTES = 4 * 1024 * 1024
"""Each of them gets so much at least: a second thread for less costs more than it saves."""
FRAME_RANGES = 8192
FRAME_BYTES = 64 * 1024 * 1024
FRAMES_AHEAD = 2
"""Read requests sent before their data is received; they must fit into the socket buffers, or both ends would wait."""

_OPENING = frame_header(FrameKind.READ, 0)[: struct.calcsize("<4sH")]
"""Magic and version, as every frame begins."""
_THANKS = messages.encode(messages.Done())


class TcpTransport:
    """`dial(deadline)` opens another attached socket to the daemon."""

    def __init__(self, dial: Callable[[float], socket.socket]) -> None:
        self._dial = dial
        self._slots = threading.BoundedSemaphore(SOCKETS_MAX)
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._busy: set[socket.socket] = set()
        self._is_closed = False

    def read_batch(
        self,
        ranges: Sequence[tuple[int, memoryview]],
        *,
        deadline: float,
        on_range: Callable[[int], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        if not ranges:
            return
        views = [into for _, into in ranges]
        frames = _frames([offset for offset, _ in ranges], views)
        with self._socket(deadline, cancellation) as sock:
            for frame in frames[:FRAMES_AHEAD]:
                _request(sock, frame, deadline)
            for index, frame in enumerate(frames):
                self._receive(sock, frame, views, deadline, on_range)
                if index + FRAMES_AHEAD < len(frames):
                    _request(sock, frames[index + FRAMES_AHEAD], deadline)

    def write_batch(
        self,
        put_id: bytes,
        ranges: Sequence[tuple[int, Buffer]],
        *,
        deadline: float,
        cancellation: Cancellation | None = None,
    ) -> None:
        if not ranges:
            return
        sources = [source for _, source in ranges]
        frames = _frames([offset for offset, _ in ranges], sources)
        with self._socket(deadline, cancellation) as sock:
            for frame in frames:
                body = put_id + frame.ranges.tobytes()
                header = frame_header(FrameKind.WRITE, len(body), frame.size_bytes)
                send_all(sock, [header + body, *sources[frame.start : frame.stop]], deadline)
                receive_reply(sock, messages.Done, deadline)

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
        wire = _native.wire()
        if wire is None:
            read_by_ranges(
                self.read_batch,
                batch,
                checksums,
                deadline=deadline,
                done=done,
                cancellation=cancellation,
                headers=headers,
            )
            return
        with self._lanes(batch, deadline, cancellation) as lanes:
            moves = (batch.offsets, batch.layers, batch.rows, checksums, done, deadline, headers)
            _check(wire.fetch_pages(lanes, _OPENING, FRAME_BYTES, FRAME_RANGES, *moves), batch)

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
        wire = _native.wire()
        if wire is None:
            write_by_ranges(self.write_batch, put_id, batch, checksums, deadline=deadline, ready=ready, headers=headers)
            return
        with self._lanes(batch, deadline, None) as lanes:
            what = (batch.offsets, batch.layers, batch.rows, checksums, ready, deadline, headers)
            _check(wire.push_pages(lanes, _OPENING, FRAME_BYTES, FRAME_RANGES, put_id, _THANKS, *what), batch)

    def mapping(self) -> memoryview | None:
        return None

    def put_opened(self, put_id: bytes, deadline: float) -> None:
        """Nothing to keep: the daemon checks every write."""

    def put_closed(self, put_id: bytes) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for sock in idle:
            sock.close()
        for sock in busy:
            shut(sock)

    def _receive(
        self,
        sock: socket.socket,
        frame: _Frame,
        views: Sequence[memoryview],
        deadline: float,
        on_range: Callable[[int], None] | None,
    ) -> None:
        header = receive_header(sock, deadline)
        if header.kind is not FrameKind.DATA or header.payload_bytes != frame.size_bytes:
            receive_reply(sock, messages.Done, deadline, header)
            raise TransportError("the daemon answered a read without data")
        progress = None if on_range is None else lambda filled: on_range(frame.start + filled)
        receive_all(sock, views[frame.start : frame.stop], deadline, progress)

    @contextmanager
    def _lanes(self, batch: PageBatch, deadline: float, cancellation: Cancellation | None) -> Iterator[tuple[int, ...]]:
        """Sockets for one batch: a large one takes several, as many as are free; the first it waits for."""
        size_bytes = len(batch.rows) * sum(r.size for layer in batch.layers for r in layer.ranges)
        wanted = max(1, min(LANES_MAX, size_bytes // LANE_BYTES, len(batch.rows)))
        with ExitStack() as stack:
            sockets = [stack.enter_context(self._socket(deadline, cancellation))]
            while len(sockets) < wanted and self._slots.acquire(blocking=False):
                sockets.append(stack.enter_context(self._socket(deadline, cancellation, has_slot=True)))
            yield tuple(sock.fileno() for sock in sockets)

    @contextmanager
    def _socket(
        self, deadline: float, cancellation: Cancellation | None, *, has_slot: bool = False
    ) -> Iterator[socket.socket]:
        """A socket for one batch; closed instead of reused unless the batch ends well."""
        if not has_slot and not self._slots.acquire(timeout=remaining_s(deadline)):
            raise TransportTimeout("all sockets to the daemon are busy")
        try:
            sock = self._take(deadline)
            try:
                if cancellation is None:
                    yield sock
                else:
                    with cancellation.stopping(lambda: shut(sock)):
                        yield sock
            except BaseException:
                self._put_back(sock, is_whole=False)
                if cancellation is not None:
                    cancellation.check()
                raise
            self._put_back(sock, is_whole=True)
        finally:
            self._slots.release()

    def _take(self, deadline: float) -> socket.socket:
        with self._lock:
            if self._is_closed:
                raise TransportError("the connection was closed")
            sock = self._take_idle()
        if sock is None:
            sock = self._dial(deadline)
        with self._lock:
            self._busy.add(sock)
        return sock

    def _take_idle(self) -> socket.socket | None:
        """The daemon closes sockets that were silent for long: those are no fault, only of no use."""
        while self._idle:
            sock = self._idle.pop()
            if not is_hung_up(sock):
                return sock
            sock.close()
        return None

    def _put_back(self, sock: socket.socket, *, is_whole: bool) -> None:
        with self._lock:
            self._busy.discard(sock)
            if is_whole and not self._is_closed:
                self._idle.append(sock)
                return
        sock.close()


def _check(how: tuple[int, int, int, bytes], batch: PageBatch) -> None:
    """Raises what the end of a batch means, or what the daemon said instead of going on."""
    *end, said = how
    if end[0] == Ended.ANSWERED:
        try:
            header = parse_frame_header(said[: FRAME.size])
        except MalformedFrame as error:
            raise ProtocolMismatch(str(error)) from error
        if header.kind is FrameKind.REPLY:
            parse_reply(said[FRAME.size :], messages.Done)
    check_end((end[0], end[1], end[2]), batch, "the connection broke")


class _Frame:
    """Ranges `start` .. `stop - 1` of a batch."""

    __slots__ = ("ranges", "size_bytes", "start", "stop")

    def __init__(self, start: int, stop: int, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> None:
        self.start = start
        self.stop = stop
        self.size_bytes = int(sizes.sum())
        starts = np.concatenate(([True], offsets[1:] != offsets[:-1] + sizes[:-1])).nonzero()[0]
        self.ranges = np.empty(len(starts), dtype=RANGE_DTYPE)
        self.ranges["offset"] = offsets[starts]
        self.ranges["size"] = np.add.reduceat(sizes, starts)


def _frames(offset_list: list[int], buffers: Sequence[Buffer]) -> list[_Frame]:
    """Split a batch; adjacent ranges within a frame are merged. Raises OutOfBounds."""
    offsets = np.array(offset_list, dtype=np.int64)
    sizes = np.fromiter(map(len, buffers), dtype=np.int64, count=len(buffers))
    if offsets.min() < 0 or sizes.min() <= 0 or sizes.max() > FRAME_BYTES:
        raise OutOfBounds(f"ranges start at 0 and hold 1 to {FRAME_BYTES} bytes")
    ends = sizes.cumsum()
    frames, start = [], 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = min(int(np.searchsorted(ends, before + FRAME_BYTES, side="right")), start + FRAME_RANGES)
        frames.append(_Frame(start, stop, offsets[start:stop], sizes[start:stop]))
        start = stop
    return frames


def _request(sock: socket.socket, frame: _Frame, deadline: float) -> None:
    body = frame.ranges.tobytes()
    send_all(sock, [frame_header(FrameKind.READ, len(body)) + body], deadline)
