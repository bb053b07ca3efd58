"""Connections to memory-pool daemons.

    connection = connect(segment, deadline=…)          shared memory where the daemon's socket is reachable, else TCP
    extents = connection.allocate(put_id, count, page_bytes, timeout_s, deadline=…)
    connection.transport.write_batch(…)

`ConnectionCache` keeps one connection per daemon epoch for a whole process. Everything here blocks and is thread-safe.
"""

from __future__ import annotations

import enum
import os
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial

from stratakv.pool import messages
from stratakv.pool.auth import NONCE_BYTES, PoolCredentials
from stratakv.pool.control import ControlChannel, parse_reply, receive_reply
from stratakv.pool.errors import EpochChanged, NotAMember, ProtocolMismatch, TransportError, TransportTimeout
from stratakv.pool.framing import receive_exactly, remaining_s, send_frame, tune
from stratakv.pool.messages import FRAME, FrameKind, MalformedFrame, parse_frame_header
from stratakv.pool.mooncake import MooncakeTransport, TransferEngine
from stratakv.pool.shm import ShmTransport, received_memory
from stratakv.pool.tcp import TcpTransport
from stratakv.pool.transport import Transport
from stratakv.wire import Extent, Segment

RETRY_AFTER_S = 1.0
"""A daemon that failed is not tried again for so long, so that not every request waits for it in vain."""
CONNECTIONS_MAX = 1024
"""Daemons a process is connected to; the one used longest ago is let go."""


class TransportKind(enum.StrEnum):
    """How a segment is reached."""

    SHM = "shm"
    TCP = "tcp"
    MOONCAKE = "mooncake"


class DmpConnection:
    """One daemon epoch, attached to."""

    def __init__(self, segment: Segment, kind: TransportKind, control: ControlChannel, transport: Transport) -> None:
        self.segment = segment
        self.kind = kind
        self.transport = transport
        self._control = control

    def allocate(
        self, put_id: bytes, count: int, page_bytes: int, timeout_s: float, *, deadline: float, term: int = 0
    ) -> list[Extent]:
        """Pages for a put, consecutive where possible; the same ones when asked again.

        The put may be written for `timeout_s`; `term` is that of its grant. Raises TransportError, SegmentFull, PutRefused.
        """
        put_deadline = time.monotonic() + timeout_s
        request = messages.Allocate(put_id, count, page_bytes, timeout_s, term)
        reply = self._control.call(request, messages.Extents, deadline)
        self.transport.put_opened(put_id, put_deadline)
        return reply.extents

    def release(self, put_id: bytes, *, deadline: float) -> None:
        """Write no more for the put; the daemon frees it when the meta server calls it void. Raises TransportError."""
        self.transport.put_closed(put_id)
        self._control.call(messages.Release(put_id), messages.Done, deadline)

    def stats(self, *, deadline: float) -> messages.DaemonStats:
        """Raises TransportError."""
        return self._control.call(messages.GetDaemonStats(), messages.DaemonStats, deadline)

    def close(self) -> None:
        """Calls in progress fail. Safe to call more than once."""
        self._control.close()
        self.transport.close()


def connect(
    segment: Segment,
    *,
    deadline: float,
    force: TransportKind | None = None,
    shared_memory: bool = True,
    credentials: PoolCredentials | None = None,
    engine: TransferEngine | None = None,
) -> DmpConnection:
    """Attach to a daemon: `shared_memory` if that is wanted, else the transfer engine that both ends have, else TCP.

    Raises TransportError (EpochChanged if the daemon is a newer one).
    """
    if force is TransportKind.SHM or (force is None and shared_memory):
        sock = _dial_unix(segment, deadline)
        if sock is not None:
            return _attach_shm(segment, sock, deadline)
        if force is TransportKind.SHM:
            raise TransportError(f"node {segment.node} has no shared memory for this process")
    sock, attached = _attach_tcp(segment, credentials, deadline)
    dial = partial(_dial_tcp, segment, credentials)
    control = ControlChannel(sock, dial)
    if force is not TransportKind.TCP and engine is not None and attached.engine:
        return DmpConnection(segment, TransportKind.MOONCAKE, control, _by_engine(engine, attached, control))
    if force is TransportKind.MOONCAKE:
        control.close()
        raise TransportError(f"node {segment.node} and this process have no transfer engine in common")
    return DmpConnection(segment, TransportKind.TCP, control, TcpTransport(dial))


def _by_engine(engine: TransferEngine, attached: messages.Attached, control: ControlChannel) -> MooncakeTransport:
    def check_daemon(deadline: float) -> None:
        control.call(messages.GetDaemonStats(), messages.DaemonStats, deadline)

    return MooncakeTransport(engine, attached.engine, attached.address, attached.size_bytes, check_daemon)


def _dial_unix(segment: Segment, deadline: float) -> socket.socket | None:
    """None if no such socket is reachable from here."""
    if not segment.socket_name:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(remaining_s(deadline))
    try:
        sock.connect("\0" + segment.socket_name)
    except TimeoutError:
        sock.close()
        raise TransportTimeout(f"node {segment.node} takes no connection") from None
    except OSError:
        # Another host, another network namespace, or a daemon that is gone: TCP will tell.
        sock.close()
        return None
    tune(sock)
    return sock


def _dial_tcp(segment: Segment, credentials: PoolCredentials | None, deadline: float) -> socket.socket:
    return _attach_tcp(segment, credentials, deadline)[0]


def _attach_tcp(
    segment: Segment, credentials: PoolCredentials | None, deadline: float
) -> tuple[socket.socket, messages.Attached]:
    try:
        sock = socket.create_connection((segment.host, segment.port), timeout=remaining_s(deadline))
    except TimeoutError:
        raise TransportTimeout(f"node {segment.node} takes no connection") from None
    except OSError as error:
        raise TransportError(f"node {segment.node} cannot be reached: {error}") from error
    tune(sock)
    try:
        if credentials is None:
            _send_attach(sock, segment, deadline)
        else:
            _prove_membership(sock, segment, credentials, deadline)
        attached = receive_reply(sock, messages.Attached, deadline)
        _check_attached(attached, segment)
    except BaseException:
        sock.close()
        raise
    return sock, attached


def _attach_shm(segment: Segment, sock: socket.socket, deadline: float) -> DmpConnection:
    try:
        _send_attach(sock, segment, deadline)
        attached, fds = _receive_attached(sock, deadline)
        fd = received_memory(fds, attached.size_bytes)
        try:
            _check_attached(attached, segment)
            transport = ShmTransport(fd, attached.size_bytes, sock, populates=not attached.is_limited)
        finally:
            os.close(fd)
    except BaseException:
        sock.close()
        raise
    return DmpConnection(segment, TransportKind.SHM, ControlChannel(sock), transport)


def _prove_membership(sock: socket.socket, segment: Segment, credentials: PoolCredentials, deadline: float) -> None:
    """Each end shows that it knows the secret, the daemon first; not over the Unix socket, where the kernel names the peer."""
    nonce = os.urandom(NONCE_BYTES)
    _send_attach(sock, segment, deadline, nonce)
    reply = receive_reply(sock, messages.Message, deadline)
    if not isinstance(reply, messages.Challenge):
        raise NotAMember(f"node {segment.node} does not know the secret of this pool")
    credentials.check(reply.proof, "daemon", segment.epoch, nonce, reply.nonce)
    prove = messages.Prove(credentials.proof("member", segment.epoch, nonce, reply.nonce))
    send_frame(sock, FrameKind.CONTROL, messages.encode(prove), deadline)


def _send_attach(sock: socket.socket, segment: Segment, deadline: float, nonce: bytes = b"") -> None:
    request = messages.Attach(messages.PROTOCOL_VERSION, segment.epoch, nonce)
    send_frame(sock, FrameKind.CONTROL, messages.encode(request), deadline)


def _receive_attached(sock: socket.socket, deadline: float) -> tuple[messages.Attached, list[int]]:
    """The reply, and the descriptors that came with its first byte."""
    sock.settimeout(remaining_s(deadline))
    try:
        raw, fds, _, _ = socket.recv_fds(sock, FRAME.size, 1, socket.MSG_CMSG_CLOEXEC)
        sock.settimeout(None)
        header = parse_frame_header(raw + receive_exactly(sock, FRAME.size - len(raw), deadline))
    except TimeoutError:
        raise TransportTimeout("the daemon does not answer") from None
    except MalformedFrame as error:
        raise ProtocolMismatch(str(error)) from error
    except OSError as error:
        raise TransportError(f"the connection broke while attaching: {error}") from error
    body = bytes(receive_exactly(sock, header.body_bytes, deadline))
    return parse_reply(body, messages.Attached), list(fds)


def _check_attached(attached: messages.Attached, segment: Segment) -> None:
    if attached.epoch != segment.epoch or attached.size_bytes != segment.size_bytes:
        raise EpochChanged(f"node {segment.node} was started anew")


@dataclass(slots=True)
class _Slot:
    """A daemon epoch's place in the cache; the lock is held while connecting, so that one thread does it for all."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    connection: DmpConnection | None = None
    retry_at: float = 0.0
    failure: str = ""
    is_void: bool = False
    """No longer in the cache: what is connected now must be closed again."""


class ConnectionCache:
    """The connections of one process, by (node, epoch)."""

    def __init__(
        self,
        *,
        force: TransportKind | None = None,
        shared_memory: bool = True,
        credentials: PoolCredentials | None = None,
        engine: TransferEngine | None = None,
    ) -> None:
        self._engine = engine
        self._force = force
        self._shared_memory = shared_memory
        self._credentials = credentials
        self._lock = threading.Lock()
        self._slots: OrderedDict[tuple[str, bytes], _Slot] = OrderedDict()

    def get(self, segment: Segment, *, deadline: float) -> DmpConnection:
        """The connection to this epoch, made now if there is none. Raises TransportError.

        After a failure the same error comes at once for `RETRY_AFTER_S`.
        """
        slot = self._slot(segment)
        if not slot.lock.acquire(timeout=remaining_s(deadline)):
            raise TransportTimeout(f"node {segment.node} takes no connection")
        try:
            if slot.connection is not None:
                return slot.connection
            if time.monotonic() < slot.retry_at:
                raise TransportError(f"node {segment.node} failed a moment ago: {slot.failure}")
            return self._connect(slot, segment, deadline)
        finally:
            slot.lock.release()

    def drop(self, connection: DmpConnection, reason: str = "its connection was dropped") -> None:
        """Close a connection that failed; the next `get` makes another one after a pause."""
        with self._lock:
            slot = self._slots.get((connection.segment.node, connection.segment.epoch))
        if slot is not None:
            with slot.lock:
                if slot.connection is connection:
                    slot.connection = None
                    slot.retry_at, slot.failure = time.monotonic() + RETRY_AFTER_S, reason
        connection.close()

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            slots = list(self._slots.values())
            self._slots.clear()
        for slot in slots:
            _close_slot(slot)

    def _connect(self, slot: _Slot, segment: Segment, deadline: float) -> DmpConnection:
        try:
            connection = connect(
                segment,
                deadline=deadline,
                force=self._force,
                shared_memory=self._shared_memory,
                credentials=self._credentials,
                engine=self._engine,
            )
        except TransportError as error:
            slot.retry_at, slot.failure = time.monotonic() + RETRY_AFTER_S, error.message
            raise
        if slot.is_void:
            connection.close()
            raise EpochChanged(f"node {segment.node} was started anew, or is no longer wanted")
        slot.connection = connection
        return connection

    def _slot(self, segment: Segment) -> _Slot:
        key = (segment.node, segment.epoch)
        void: list[_Slot] = []
        with self._lock:
            slot = self._slots.get(key)
            if slot is None:
                # A new epoch: what is connected to the node's earlier ones is void.
                void = [self._slots.pop(known) for known in list(self._slots) if known[0] == segment.node]
                if len(self._slots) >= CONNECTIONS_MAX:
                    void.append(self._slots.popitem(last=False)[1])
                slot = self._slots[key] = _Slot()
            self._slots.move_to_end(key)
        for old in void:
            _close_slot(old)
        return slot


def _close_slot(slot: _Slot) -> None:
    slot.is_void = True
    # Whoever holds the lock is connecting, and will see that the slot is void; there is no need to wait for it.
    if slot.lock.acquire(blocking=False):
        connection, slot.connection = slot.connection, None
        slot.lock.release()
        if connection is not None:
            connection.close()
