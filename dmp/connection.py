"""One client's connection, served by a thread of its own: control requests, and bytes in and out of the segment.

The event loop has no part in it, so large transfers never hold it up; nor has the interpreter where the C++ module was built:
`serve_frames` answers reads and writes that are in order, and hands everything else to what is here. Whatever a client sends
or fails to send ends at most this connection; writes it leaves unfinished belong to puts that are void when their time runs out.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from dmp import http_face
from dmp.disk.store import DiskStore
from dmp.metrics import DaemonMetrics
from dmp.puts import PutTable
from dmp.segment import MemorySegment
from dmp.traffic import Flow, count, no_traffic
from stratakv import _native
from stratakv._native import Ended
from stratakv.errors import InvalidRequest, StrataError
from stratakv.layout import ALIGNMENT_BYTES
from stratakv.pool import messages
from stratakv.pool.auth import NONCE_BYTES, PoolCredentials
from stratakv.pool.errors import (
    NotAMember,
    OutOfBounds,
    ProtocolMismatch,
    PutRefused,
    SegmentFull,
    TransportError,
    TransportTimeout,
)
from stratakv.pool.fence import TermFence
from stratakv.pool.framing import receive_all, receive_exactly, receive_header, send_all, send_frame
from stratakv.pool.messages import (
    FrameHeader,
    FrameKind,
    MalformedFrame,
    RefusalCode,
    frame_header,
    parse_frame_header,
)
from stratakv.wire import PUT_ID_BYTES

FRAME_TIMEOUT_S = 30.0
"""A frame that was begun, in either direction, is over by then."""
DISCARD_BYTES = 1024 * 1024
"""Scratch memory for the payload of a refused write."""

_CODES: dict[type[StrataError], RefusalCode] = {
    SegmentFull: RefusalCode.SEGMENT_FULL,
    PutRefused: RefusalCode.PUT_REFUSED,
    OutOfBounds: RefusalCode.OUT_OF_BOUNDS,
}


_OPENING = frame_header(FrameKind.CONTROL, 0)[: struct.calcsize("<4sH")]
"""Magic and version, as every frame begins."""
_DONE_FRAME = frame_header(FrameKind.REPLY, len(messages.encode(messages.Done()))) + messages.encode(messages.Done())
_LIMITS = (messages.CONTROL_BYTES_MAX, messages.RANGES_MAX, messages.TRANSFER_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Served:
    """What all connections of a daemon share."""

    node: str
    segment: MemorySegment
    puts: PutTable
    idle_timeout_s: float
    stats: Callable[[], messages.DaemonStats]
    credentials: PoolCredentials | None
    metrics: DaemonMetrics
    disk: DiskStore | None = None
    """Attached to by its own epoch, and only read."""
    fence: TermFence = field(default_factory=TermFence)
    engine: str = ""
    """Name of the transfer engine that reaches the segment too, if there is one."""


class Connection:
    """Protocol state of one connection."""

    def __init__(self, sock: socket.socket, served: Served) -> None:
        self._sock = sock
        self._served = served
        self._is_attached = False
        self._disk: DiskStore | None = None
        """What is read, if not the memory."""
        self._nonces: tuple[bytes, bytes] | None = None
        """The client's and ours, while its proof is awaited."""
        self.traffic = no_traffic()
        """Counted by this connection's thread only."""

    def run(self) -> None:
        """Serve until the client leaves or breaks the protocol. Raises TransportError when it does the latter."""
        while (frame := self._next_frame()) is not None:
            header, body, deadline = frame
            if header.kind not in (FrameKind.CONTROL, FrameKind.READ, FrameKind.WRITE):
                raise ProtocolMismatch(f"a client does not send {header.kind.name} frames")
            if header.kind is not FrameKind.CONTROL and not self._is_attached:
                raise ProtocolMismatch("bytes were asked for before Attach")
            if header.kind is FrameKind.CONTROL:
                self._control(body, deadline)
            elif header.kind is FrameKind.READ:
                self._read(body, deadline)
            else:
                self._write(header, body, deadline)

    def _next_frame(self) -> tuple[FrameHeader, bytes, float] | None:
        """Header, body and deadline; None when the client has left or fallen silent."""
        wire = _native.wire()
        if wire is None or not self._is_attached or self._disk is not None:
            return self._receive_frame()
        served = self._served
        idle_s = -1.0 if self._is_neighbour else served.idle_timeout_s
        what = (served.segment.memory, served.puts.grants, _OPENING, _DONE_FRAME, _LIMITS)
        ended, raw, body = wire.serve_frames(self._sock.fileno(), *what, idle_s, FRAME_TIMEOUT_S, self.traffic)
        if ended == Ended.LATE:
            raise TransportTimeout("a frame was not over in time")
        if ended != Ended.WHOLE:
            raise TransportError("the connection broke in the middle of a frame")
        if not raw:
            return None
        try:
            return parse_frame_header(raw), body, time.monotonic() + FRAME_TIMEOUT_S
        except MalformedFrame as error:
            raise ProtocolMismatch(str(error)) from error

    @property
    def _is_neighbour(self) -> bool:
        """The kernel tells when a process of this host ends; and to one that maps the segment, a closed socket means that the
        daemon has died."""
        return self._is_attached and self._sock.family == socket.AF_UNIX

    def _receive_frame(self) -> tuple[FrameHeader, bytes, float] | None:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        idle_timeout_ms = None if self._is_neighbour else self._served.idle_timeout_s * 1000
        try:
            first = self._sock.recv(1, socket.MSG_PEEK) if poller.poll(idle_timeout_ms) else b""
        except ConnectionError:
            return None
        if first == http_face.FIRST_BYTE and not self._is_attached and self._sock.family != socket.AF_UNIX:
            http_face.answer(self._sock, self._served.metrics.registry)
            return None
        if not first:
            return None
        deadline = time.monotonic() + FRAME_TIMEOUT_S
        header = receive_header(self._sock, deadline)
        is_asked = header.kind in (FrameKind.CONTROL, FrameKind.READ, FrameKind.WRITE)
        return header, bytes(receive_exactly(self._sock, header.body_bytes if is_asked else 0, deadline)), deadline

    def _reply(self, reply: messages.ControlReply, deadline: float) -> None:
        send_frame(self._sock, FrameKind.REPLY, messages.encode(reply), deadline)

    def _refuse(self, error: StrataError, deadline: float) -> None:
        code = _CODES.get(type(error), RefusalCode.MALFORMED)
        self._reply(messages.Refused(code, error.message), deadline)

    def _control(self, body: bytes, deadline: float) -> None:
        try:
            request = messages.decode_request(body)
        except msgspec.MsgspecError as error:
            raise ProtocolMismatch(f"not a control request: {error}") from error
        if isinstance(request, messages.Attach):
            self._attach(request, deadline)
            return
        if isinstance(request, messages.Prove):
            self._admit(request, deadline)
            return
        if not self._is_attached:
            raise ProtocolMismatch("the first request must be Attach")
        try:
            self._reply(self._answer(request), deadline)
        except StrataError as error:
            if isinstance(error, TransportError):
                raise
            self._refuse(error, deadline)

    def _attach(self, request: messages.Attach, deadline: float) -> None:
        served = self._served
        if request.protocol != messages.PROTOCOL_VERSION:
            text = f"this daemon speaks version {messages.PROTOCOL_VERSION}, the client {request.protocol}"
            self._reply(messages.Refused(RefusalCode.VERSION, text), deadline)
            return
        is_disk = served.disk is not None and request.epoch == served.disk.epoch
        self._disk = served.disk if is_disk else None
        if request.epoch != served.segment.epoch and not is_disk:
            text = f"node {served.node} was started anew"
            self._reply(messages.Refused(RefusalCode.EPOCH_CHANGED, text), deadline)
            return
        if self._sock.family == socket.AF_UNIX and not is_disk:
            self._hand_over_memory()
        elif served.credentials is None:
            self._is_attached = True
            self._reply(self._attached, deadline)
        else:
            self._challenge(request, served.credentials, deadline)

    def _challenge(self, request: messages.Attach, credentials: PoolCredentials, deadline: float) -> None:
        if len(request.nonce) != NONCE_BYTES:
            text = f"node {self._served.node} answers members of its pool only: it has a pool.secret"
            self._reply(messages.Refused(RefusalCode.NOT_A_MEMBER, text), deadline)
            return
        nonce = os.urandom(NONCE_BYTES)
        self._nonces = request.nonce, nonce
        proof = credentials.proof("daemon", self._attached.epoch, *self._nonces)
        self._reply(messages.Challenge(nonce, proof), deadline)

    def _admit(self, request: messages.Prove, deadline: float) -> None:
        nonces, self._nonces = self._nonces, None
        credentials = self._served.credentials
        if nonces is None or credentials is None:
            raise ProtocolMismatch("nothing is to be proved")
        try:
            credentials.check(request.proof, "member", self._attached.epoch, *nonces)
        except NotAMember as error:
            self._reply(messages.Refused(RefusalCode.NOT_A_MEMBER, error.message), deadline)
            return
        self._is_attached = True
        self._reply(self._attached, deadline)

    @property
    def _attached(self) -> messages.Attached:
        served = self._served
        if self._disk is not None:
            return messages.Attached(served.node, self._disk.epoch, self._disk.size_bytes)
        memory = served.segment
        return messages.Attached(
            served.node, memory.epoch, memory.size_bytes, served.engine, memory.address, served.puts.limit_bytes > 0
        )

    def _hand_over_memory(self) -> None:
        self._is_attached = True
        body = messages.encode(self._attached)
        frame = frame_header(FrameKind.REPLY, len(body)) + body
        # One small message on an idle socket: the kernel takes it whole.
        socket.send_fds(self._sock, [frame], [self._served.segment.fd], socket.MSG_NOSIGNAL)

    def _answer(self, request: messages.ControlRequest) -> messages.ControlReply:
        puts = self._served.puts
        if self._disk is not None and not isinstance(request, messages.GetDaemonStats):
            raise PutRefused("nothing is written to a disk from outside; pages get there from the daemon's memory")
        if isinstance(request, messages.Allocate):
            _check_allocate(request)
            if request.term and not self._served.fence.admits(request.term):
                raise PutRefused("a meta server has granted this that no longer leads")
            extents = puts.allocate(request.put_id, request.count, request.page_bytes, request.timeout_s)
            self._served.metrics.granted(request.count, request.count * request.page_bytes)
            return messages.Extents(extents)
        if isinstance(request, messages.Release):
            puts.release(request.put_id)
            return messages.Done()
        return self._served.stats()

    def _read(self, body: bytes, deadline: float) -> None:
        if self._disk is not None:
            self._read_disk(self._disk, body, deadline)
            return
        try:
            offsets, sizes = self._ranges(body)
        except InvalidRequest as error:
            self._refuse(error, deadline)
            return
        total = int(sizes.sum(dtype=np.uint64))
        header = frame_header(FrameKind.DATA, 0, total)
        started = time.perf_counter()
        send_all(self._sock, [header, *self._views(offsets, sizes)], deadline)
        count(self.traffic, Flow.READ, len(sizes), total, time.perf_counter() - started)

    def _read_disk(self, disk: DiskStore, body: bytes, deadline: float) -> None:
        started = time.perf_counter()
        try:
            ranges = _parse_ranges(body)
            data = memoryview(bytearray(int(ranges["size"].sum(dtype=np.uint64))))
            ends = np.cumsum(ranges["size"], dtype=np.int64)
            starts = ends - ranges["size"]
            views = [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
            disk.read_into(list(zip(ranges["offset"].tolist(), views, strict=True)))
        except InvalidRequest as error:
            self._refuse(error, deadline)
            return
        send_all(self._sock, [frame_header(FrameKind.DATA, 0, len(data)), data], deadline)
        count(self.traffic, Flow.READ_FROM_DISK, len(ranges), len(data), time.perf_counter() - started)

    def _write(self, header: FrameHeader, body: bytes, deadline: float) -> None:
        put_id = body[:PUT_ID_BYTES]
        try:
            if self._disk is not None:
                raise PutRefused("nothing is written to a disk from outside")
            offsets, sizes = self._ranges(body[PUT_ID_BYTES:])
            if int(sizes.sum(dtype=np.uint64)) != header.payload_bytes:
                raise InvalidRequest("the payload is not as long as its ranges")
            started = time.perf_counter()
            with self._served.puts.writing(put_id, offsets, sizes):
                receive_all(self._sock, self._views(offsets, sizes), deadline)
        except InvalidRequest as error:
            # The payload is on its way: it must be read for the refusal to be heard.
            self._discard(header.payload_bytes, deadline)
            self._refuse(error, deadline)
            return
        count(self.traffic, Flow.WRITTEN, len(sizes), header.payload_bytes, time.perf_counter() - started)
        self._reply(messages.Done(), deadline)

    def _discard(self, size_bytes: int, deadline: float) -> None:
        scratch = memoryview(bytearray(min(size_bytes, DISCARD_BYTES)))
        while size_bytes:
            part = scratch[: min(size_bytes, DISCARD_BYTES)]
            receive_all(self._sock, [part], deadline)
            size_bytes -= len(part)

    def _ranges(self, packed: bytes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Checked against the segment and the limits. Raises OutOfBounds, InvalidRequest."""
        ranges = _parse_ranges(packed)
        offsets, sizes = ranges["offset"].astype(np.uint64), ranges["size"].astype(np.uint32)
        size = np.uint64(self._served.segment.size_bytes)
        if not (sizes.all() and ((offsets < size) & (sizes <= size - np.minimum(offsets, size))).all()):
            raise OutOfBounds("a range lies outside the segment, or is empty")
        return offsets, sizes

    def _views(self, offsets: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint32]) -> Sequence[memoryview]:
        memory = self._served.segment.memory
        ends = offsets + sizes
        return [memory[start:end] for start, end in zip(offsets.tolist(), ends.tolist(), strict=True)]


def _parse_ranges(packed: bytes) -> npt.NDArray[np.void]:
    """Raises InvalidRequest."""
    if not packed or len(packed) % messages.RANGE_DTYPE.itemsize:
        raise InvalidRequest("not a whole number of ranges")
    ranges = np.frombuffer(packed, dtype=messages.RANGE_DTYPE)
    if int(ranges["size"].sum(dtype=np.uint64)) > messages.TRANSFER_BYTES_MAX:
        raise InvalidRequest(f"one frame moves {messages.TRANSFER_BYTES_MAX} bytes at most")
    return ranges


def _check_allocate(request: messages.Allocate) -> None:
    if len(request.put_id) != PUT_ID_BYTES:
        raise InvalidRequest(f"a put_id has {PUT_ID_BYTES} bytes")
    if not 0 < request.count <= messages.PUT_PAGES_MAX:
        raise InvalidRequest(f"a put has 1 to {messages.PUT_PAGES_MAX} pages")
    if request.page_bytes <= 0 or request.page_bytes % ALIGNMENT_BYTES:
        raise InvalidRequest(f"page_bytes is a positive multiple of {ALIGNMENT_BYTES}")
    if not 0 < request.timeout_s <= messages.PUT_TIMEOUT_S_MAX:
        raise InvalidRequest(f"timeout_s lies between 0 and {messages.PUT_TIMEOUT_S_MAX}")
