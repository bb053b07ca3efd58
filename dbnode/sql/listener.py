"""The private listener: where infer() calls back to, over dblink. Started by `SqlFront`.

It takes connections from PostgreSQL only: on a Unix socket the kernel names the other side's uid, and everywhere the other
side must know the key. Over a network it is under TLS, with a certificate made at the start, which SCRAM vouches for. Keeps
its connections; a call belongs to one connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from dbnode.sql.binding import BindingRegistry
from dbnode.sql.explain import Explainer, Explaining
from dbnode.sql.hints import HintStats, StatementHints
from dbnode.sql.listener_connection import ListenerConnection
from dbnode.sql.memo import KeptAnswers, MemoLimits
from dbnode.sql.scram import Verifier
from dbnode.sql.server_tls import own_tls
from dbnode.sql.service import InferenceService
from dbnode.sql.session_hints import SessionHints
from dbnode.sql.statement_meter import MeteredService, StatementBook
from dbnode.sql.topics import Topics
from stratakv.errors import SetupError
from stratakv.log import EventLogger
from stratakv.process import port_taken
from stratakv.sqlfunctions import ListenerAddress

log = EventLogger(__name__)

_CERTIFICATE_NAME = "stratakv listener"
_SALT_BYTES = 16
_COMMAND_OVERHEAD_BYTES = 256 * 1024
"""Room for names and options beside the prompt."""
_BACKLOG = 512
_SOCKET_MODE_OWN = 0o600
_SOCKET_MODE_OTHERS = 0o666


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """Bounds of the listener."""

    prompt_bytes_max: int
    calls_max: int
    connections_max: int
    memo: MemoLimits

    @property
    def calls_ahead_max(self) -> int:
        """Of all calls, those made in advance."""
        return self.calls_max // 2

    @property
    def command_bytes_max(self) -> int:
        """Longest command: base64 in lines of 76 makes 77 bytes of 57."""
        return self.prompt_bytes_max * 77 // 57 + _COMMAND_OVERHEAD_BYTES


class Listener:
    """Takes dblink's connections and runs their calls on the inference service."""

    def __init__(
        self,
        address: ListenerAddress,
        limits: ListenerLimits,
        service: InferenceService,
        registry: BindingRegistry,
        book: StatementBook,
        explainer: Explainer | None,
        topics: Topics,
        *,
        postgres_uid: int,
    ) -> None:
        self.address = address
        self.limits = limits
        self.service = MeteredService(service, book)
        self.book = book
        self.explainer = explainer
        self.topics = topics
        self.explaining: set[Explaining] = set()
        self.registry = registry
        self.postgres_uid = postgres_uid
        self.tls = own_tls(_CERTIFICATE_NAME) if address.tls else None
        """Demanded of everybody, if there is one."""
        self.verifier = Verifier.of(address.key, os.urandom(_SALT_BYTES))
        self.connections: set[ListenerConnection] = set()
        self.tasks: set[asyncio.Task[str]] = set()
        self.draining = False
        self.hint_stats = HintStats()
        self._kept = KeptAnswers(limits.memo, time.monotonic)
        self._numbers = count(1)
        self._server: asyncio.Server | None = None

    @property
    def is_full(self) -> bool:
        """Whether no more calls are taken."""
        return len(self.tasks) >= self.limits.calls_max

    def make_hints(self, session: str) -> SessionHints:
        """For one session of the gateway."""
        return SessionHints(
            lambda memo: StatementHints(
                self.service, session, self.hint_stats, self.tasks, self._num_free, self.book, memo
            ),
            self.hint_stats,
            self._kept,
        )

    def _num_free(self) -> int:
        """For calls that no statement waits for yet: they never take the room of those that one does."""
        return 0 if self.draining else max(0, self.limits.calls_ahead_max - len(self.tasks))

    def next_number(self) -> int:
        """Of a connection, for its name."""
        return next(self._numbers)

    async def start(self) -> None:
        """Raises SetupError."""
        loop = asyncio.get_running_loop()
        path = self.address.socket_path
        try:
            if path is None:
                self._server = await loop.create_server(
                    lambda: ListenerConnection(self), self.address.host, self.address.port, backlog=_BACKLOG
                )
            else:
                await asyncio.to_thread(_clear_socket, path)
                self._server = await loop.create_unix_server(lambda: ListenerConnection(self), path, backlog=_BACKLOG)
                os.chmod(path, _SOCKET_MODE_OWN if self.postgres_uid == os.geteuid() else _SOCKET_MODE_OTHERS)
        except OSError as error:
            if path is None:
                raise port_taken(self.address.host, self.address.port, "sql.listener_port") from error
            raise SetupError(f"sql.listener_dir: {path}: {error.strerror}") from error
        log.info("listener_started", address=self.address.name)

    def is_calling(self, pid: int) -> bool:
        """Whether some backend with that pid waits for an answer; several clusters may have the same pid."""
        return any(connection.calling_pid == pid for connection in self.connections)

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls; those that run get `grace_s` to end."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=grace_s)

    async def close(self) -> None:
        """Stop what still runs and close every connection."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in tuple(self.connections):
            connection.close()
        if self.tasks:
            await asyncio.wait(set(self.tasks))
        if self.address.socket_path is not None and self._server is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address.socket_path)
        self._server = None


def _clear_socket(path: str) -> None:
    """Remove what a dead DB node left. Raises SetupError if one is alive there."""
    if not Path(path).exists():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise SetupError(
        f"sql.listener_dir: another DB node already listens on {path}",
        hint="end it, or choose another directory with STRATAKV_SQL_LISTENER_DIR",
    )
