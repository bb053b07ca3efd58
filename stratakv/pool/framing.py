"""Moving frames over blocking sockets with deadlines: used by the pool's clients and by the daemon's connection threads.

The kernel keeps the time (SO_RCVTIMEO, SO_SNDTIMEO), so that one call moves a megabyte with the GIL released instead of
waking Python for every packet. Deadlines are readings of `time.monotonic`.
"""

from __future__ import annotations

import bisect
import itertools
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

from stratakv.pool.errors import ProtocolMismatch, TransportError, TransportTimeout
from stratakv.pool.messages import FRAME, FrameHeader, FrameKind, MalformedFrame, frame_header, parse_frame_header

IOVECS_MAX = 1024
"""The kernel's IOV_MAX."""
CALL_BYTES = 1024 * 1024
"""Bytes asked of one receive call: few calls, and progress is reported about this often."""
SOCKET_BUFFER_BYTES = 1024 * 1024
"""Enough for 2 GB/s over a round trip of 0.5 ms. Wider ones cost more processor time, since what waits in them leaves its cache,
and on a busy machine they let one end run on while the other waits for its turn."""

Buffer = bytes | memoryview

_TIMEVAL = struct.Struct("ll")


def remaining_s(deadline: float) -> float:
    """Seconds left. Raises TransportTimeout if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TransportTimeout("the deadline passed")
    return left


def _bound(sock: socket.socket, option: int, deadline: float) -> None:
    # A zero timeval would mean forever.
    microseconds = max(1000, int(remaining_s(deadline) * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(microseconds, 1_000_000)))


def tune(sock: socket.socket) -> None:
    """Blocking, wide buffers, no delay for small frames."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def is_hung_up(sock: socket.socket) -> bool:
    """Whether an idle socket is of no more use: closed by the other end, or something arrived that nobody asked for."""
    poller = select.poll()
    poller.register(sock, select.POLLIN | select.POLLRDHUP)
    return bool(poller.poll(0))


def send_all(sock: socket.socket, buffers: Sequence[Buffer], deadline: float) -> None:
    """Send every byte, in order. Raises TransportError."""
    try:
        for start in range(0, len(buffers), IOVECS_MAX):
            _send_group(sock, buffers[start : start + IOVECS_MAX], deadline)
    except BlockingIOError:
        raise TransportTimeout("the other end did not take the bytes in time") from None
    except OSError as error:
        raise TransportError(f"the connection broke while sending: {error}") from error


def _send_group(sock: socket.socket, buffers: Sequence[Buffer], deadline: float) -> None:
    while buffers:
        _bound(sock, socket.SO_SNDTIMEO, deadline)
        buffers = _after(buffers, sock.sendmsg(buffers, (), socket.MSG_NOSIGNAL))


def _after(buffers: Sequence[Buffer], done_bytes: int) -> Sequence[Buffer]:
    """What is left of `buffers` when the first `done_bytes` are dealt with."""
    for index, buffer in enumerate(buffers):
        if done_bytes < len(buffer):
            return [memoryview(buffer)[done_bytes:], *buffers[index + 1 :]]
        done_bytes -= len(buffer)
    return ()


def receive_all(
    sock: socket.socket,
    views: Sequence[memoryview],
    deadline: float,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Fill every view, in order; `on_progress(n)` says that the first n are filled. Raises TransportError."""
    ends = list(itertools.accumulate(map(len, views)))
    start = 0
    while start < len(views):
        before = ends[start - 1] if start else 0
        stop = bisect.bisect_right(ends, before + CALL_BYTES, start + 1, min(start + IOVECS_MAX, len(ends)))
        _receive_group(sock, views[start:stop], deadline)
        start = stop
        if on_progress is not None:
            on_progress(stop)


def _receive_group(sock: socket.socket, views: Sequence[Buffer], deadline: float) -> None:
    try:
        while views:
            _bound(sock, socket.SO_RCVTIMEO, deadline)
            received = sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            if not received:
                raise TransportError("the other end closed the connection")
            views = _after(views, received)
    except BlockingIOError:
        raise TransportTimeout("the other end did not send in time") from None
    except OSError as error:
        raise TransportError(f"the connection broke while receiving: {error}") from error


def receive_exactly(sock: socket.socket, size_bytes: int, deadline: float) -> bytearray:
    """So many bytes; the caller has checked the size against a limit."""
    data = bytearray(size_bytes)
    if size_bytes:
        receive_all(sock, [memoryview(data)], deadline)
    return data


def receive_header(sock: socket.socket, deadline: float) -> FrameHeader:
    """The next frame's header. Raises ProtocolMismatch if what arrives is none."""
    try:
        return parse_frame_header(receive_exactly(sock, FRAME.size, deadline))
    except MalformedFrame as error:
        raise ProtocolMismatch(str(error)) from error


def send_frame(sock: socket.socket, kind: FrameKind, body: bytes, deadline: float) -> None:
    """A frame without payload."""
    send_all(sock, [frame_header(kind, len(body)) + body], deadline)
