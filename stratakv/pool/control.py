"""Control requests to a daemon over one socket, one at a time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import TypeVar

import msgspec

from stratakv import _native
from stratakv._native import Ended
from stratakv.errors import StrataError
from stratakv.pool import messages
from stratakv.pool.errors import (
    EpochChanged,
    NotAMember,
    OutOfBounds,
    ProtocolMismatch,
    PutRefused,
    SegmentFull,
    TransportError,
    TransportTimeout,
)
from stratakv.pool.framing import is_hung_up, receive_exactly, receive_header, remaining_s, send_frame
from stratakv.pool.messages import FrameHeader, FrameKind, MalformedFrame, RefusalCode, frame_header, parse_frame_header

ReplyT = TypeVar("ReplyT", bound=messages.Message)

_ERRORS: dict[RefusalCode, type[StrataError]] = {
    RefusalCode.MALFORMED: ProtocolMismatch,
    RefusalCode.VERSION: ProtocolMismatch,
    RefusalCode.EPOCH_CHANGED: EpochChanged,
    RefusalCode.SEGMENT_FULL: SegmentFull,
    RefusalCode.PUT_REFUSED: PutRefused,
    RefusalCode.OUT_OF_BOUNDS: OutOfBounds,
    RefusalCode.TOO_MANY: TransportError,
    RefusalCode.NOT_A_MEMBER: NotAMember,
}


def receive_reply(
    sock: socket.socket, expected: type[ReplyT], deadline: float, header: FrameHeader | None = None
) -> ReplyT:
    """The reply that comes next (its header, if that was read already). Raises what a refusal means."""
    header = header or receive_header(sock, deadline)
    if header.kind is not FrameKind.REPLY:
        raise ProtocolMismatch(f"the daemon answered with a {header.kind.name} frame")
    return parse_reply(bytes(receive_exactly(sock, header.body_bytes, deadline)), expected)


def exchange(sock: socket.socket, request: messages.Message, expected: type[ReplyT], deadline: float) -> ReplyT:
    """Send a control request and wait for its reply. Raises TransportError, and what a refusal means."""
    wire, body = _native.wire(), messages.encode(request)
    if wire is None:
        send_frame(sock, FrameKind.CONTROL, body, deadline)
        return receive_reply(sock, expected, deadline)
    frame = frame_header(FrameKind.CONTROL, len(body)) + body
    ended, raw, reply = wire.exchange_frames(sock.fileno(), frame, messages.REPLY_BYTES_MAX, deadline)
    if ended == Ended.LATE:
        raise TransportTimeout("the other end did not answer in time")
    if ended != Ended.WHOLE:
        raise TransportError("the connection broke")
    try:
        header = parse_frame_header(raw)
    except MalformedFrame as error:
        raise ProtocolMismatch(str(error)) from error
    if header.kind is not FrameKind.REPLY:
        raise ProtocolMismatch(f"the daemon answered with a {header.kind.name} frame")
    return parse_reply(reply, expected)


def parse_reply(body: bytes, expected: type[ReplyT]) -> ReplyT:
    """Raises what a refusal means, ProtocolMismatch for anything unexpected."""
    try:
        reply = messages.decode_reply(body)
    except msgspec.MsgspecError as error:
        raise ProtocolMismatch(f"the daemon's reply cannot be read: {error}") from error
    if isinstance(reply, messages.Refused):
        raise _ERRORS[reply.code](reply.message)
    if not isinstance(reply, expected):
        raise ProtocolMismatch(f"the daemon answered {type(reply).__name__}, not {expected.__name__}")
    return reply


def shut(sock: socket.socket) -> None:
    """Wake whoever is blocked on the socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It was closed or broken already, which is all that is wanted.
        return


class ControlChannel:
    """Thread-safe request and reply. After any TransportError the channel is closed: answers could be mixed up.

    With `redial`, a socket that the daemon closed while it was idle is replaced.
    """

    def __init__(self, sock: socket.socket, redial: Callable[[float], socket.socket] | None = None) -> None:
        self.sock = sock
        self._redial = redial
        self._lock = threading.Lock()
        self._is_closed = False

    def call(self, request: messages.Message, expected: type[ReplyT], deadline: float) -> ReplyT:
        """Raises TransportError, and what a refusal means."""
        if not self._lock.acquire(timeout=remaining_s(deadline)):
            raise TransportTimeout("the daemon is busy with earlier requests of this process")
        try:
            self._renew(deadline)
            return exchange(self.sock, request, expected, deadline)
        except TransportError:
            self._is_closed = True
            # Others may hold the same socket by another descriptor: to them, and to the daemon, it ends now.
            shut(self.sock)
            self.sock.close()
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """A call in progress fails."""
        self._is_closed = True
        shut(self.sock)
        with self._lock:
            self.sock.close()

    def _renew(self, deadline: float) -> None:
        if self._is_closed:
            raise TransportError("the connection was closed")
        if self._redial is not None and is_hung_up(self.sock):
            self.sock.close()
            self.sock = self._redial(deadline)
