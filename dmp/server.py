"""Listeners of a daemon: TCP for other hosts, an abstract Unix socket for processes of this one.

Accepting happens on the event loop; each connection is then served by a thread of its own (`dmp.connection`).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import threading
import time

from dmp.connection import Connection, Served
from dmp.disk.store import DiskStore
from dmp.metrics import DaemonMetrics
from dmp.puts import PutTable
from dmp.segment import MemorySegment
from dmp.traffic import Amount, Flow, no_traffic
from stratakv._native.base import Int64s
from stratakv.errors import SetupError
from stratakv.log import EventLogger
from stratakv.pool import messages
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.errors import TransportError
from stratakv.pool.fence import TermFence
from stratakv.pool.framing import send_frame, tune
from stratakv.pool.messages import FrameKind, RefusalCode
from stratakv.process import port_taken
from stratakv.settings import DmpSettings

log = EventLogger("dmp.server")

BACKLOG = 128
REFUSAL_TIMEOUT_S = 0.1
JOIN_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.1
"""After a failure to accept, for want of descriptors mostly."""

_UCRED = struct.Struct("iII")


class DaemonServer:
    """Both listeners and all connections of one segment."""

    def __init__(
        self,
        settings: DmpSettings,
        segment: MemorySegment,
        puts: PutTable,
        credentials: PoolCredentials | None,
        metrics: DaemonMetrics,
        disk: DiskStore | None = None,
        engine: str = "",
        fence: TermFence | None = None,
    ) -> None:
        self._settings = settings
        self._segment = segment
        self._puts = puts
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, tuple[Connection, threading.Thread]] = {}
        self._past = no_traffic()
        """Of connections that have ended."""
        self._served = Served(
            settings.node,
            segment,
            puts,
            settings.idle_timeout_s,
            self.stats,
            credentials,
            metrics,
            disk,
            fence or TermFence(),
            engine,
        )
        metrics.watch(puts, disk, self.stats, self.traffic)
        self._tcp = self._listen_tcp()
        self._unix = self._listen_unix()

    @property
    def port(self) -> int:
        """The TCP port, also when the settings asked for any."""
        return int(self._tcp.getsockname()[1])

    def stats(self) -> messages.DaemonStats:
        with self._lock:
            num_connections = len(self._connections)
        moved = self.traffic()[:, Amount.BYTES].tolist()
        return messages.DaemonStats(
            size_bytes=self._segment.size_bytes,
            used_bytes=self._puts.used_bytes,
            extents=self._puts.num_extents,
            puts_open=self._puts.num_open,
            connections=num_connections,
            bytes_read=moved[Flow.READ] + moved[Flow.READ_FROM_DISK],
            bytes_written=moved[Flow.WRITTEN],
        )

    def traffic(self) -> Int64s:
        """What all connections have moved so far: [flow][amount]."""
        with self._lock:
            return sum((connection.traffic for connection, _ in self._connections.values()), self._past.copy())

    async def accept(self) -> None:
        """Take connections until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._accept_from(self._tcp))
            tasks.create_task(self._accept_from(self._unix))

    def close(self) -> None:
        """End all connections and wait for their threads."""
        for listener in (self._tcp, self._unix):
            listener.close()
        with self._lock:
            open_now = list(self._connections.items())
        for sock, _ in open_now:
            _shut(sock)
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        for _, (_, thread) in open_now:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _listen_tcp(self) -> socket.socket:
        host, port = self._settings.host, self._settings.port
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                raise port_taken(host, port, "dmp.port") from None
            raise SetupError(f"dmp.host = {host}: cannot listen there, port {port}: {error.strerror}") from None
        listener.listen(BACKLOG)
        listener.setblocking(False)
        return listener

    def _listen_unix(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("\0" + self._segment.socket_name)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        return listener

    async def _accept_from(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("accept_failed", error=error)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        if sock.family == socket.AF_UNIX and _peer_uid(sock) != os.geteuid():
            log.warning("peer_refused", uid=_peer_uid(sock))
            sock.close()
            return
        tune(sock)
        with self._lock:
            is_full = len(self._connections) >= self._settings.connections_max
            if not is_full:
                connection = Connection(sock, self._served)
                name = f"dmp-{'shm' if sock.family == socket.AF_UNIX else 'tcp'}-{sock.fileno()}"
                thread = threading.Thread(target=self._serve, args=(sock, connection), name=name, daemon=True)
                self._connections[sock] = (connection, thread)
        if is_full:
            _refuse_one_more(sock, self._settings.connections_max)
            return
        thread.start()

    def _serve(self, sock: socket.socket, connection: Connection) -> None:
        try:
            connection.run()
        except TransportError as error:
            log.info("connection_ended", reason=error.message)
        except Exception:
            # Our own bug must not take other clients' connections along.
            log.exception("connection_failed")
        finally:
            with self._lock:
                del self._connections[sock]
                self._past += connection.traffic
            sock.close()


def _refuse_one_more(sock: socket.socket, connections_max: int) -> None:
    refusal = messages.Refused(RefusalCode.TOO_MANY, f"the daemon serves {connections_max} connections at once")
    try:
        send_frame(sock, FrameKind.REPLY, messages.encode(refusal), time.monotonic() + REFUSAL_TIMEOUT_S)
    except TransportError as error:
        log.debug("refusal_unheard", reason=error.message)
    sock.close()


def _peer_uid(sock: socket.socket) -> int:
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        log.debug("shutdown_of_closed", reason=error)
