"""The port that PostgreSQL clients connect to: opens sessions, passes cancels on, bounds and drains. Started by `SqlFront`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import count

from dbnode.sql.backend import BackendAddress
from dbnode.sql.binding import BindingRegistry
from dbnode.sql.errors import AdminShutdown, BackendUnreachable, TooManyClients
from dbnode.sql.handshake import ClientHandshake
from dbnode.sql.hidden_calls import DATABASES_MAX, HiddenCalls
from dbnode.sql.messages import Severity, error_response
from dbnode.sql.session import Session
from dbnode.sql.session_hints import SessionHints
from dbnode.sql.startup import CancelKey, StartupPacket, cancel_request
from dbnode.sql.statement_meter import StatementBook
from stratakv.errors import StrataError
from stratakv.log import EventLogger
from stratakv.process import port_taken
from stratakv.settings import SqlSettings

log = EventLogger(__name__)

HANDSHAKES_MAX = 1000
"""Connections that are no session yet: logins that begin, and cancels."""
CANCELS_AGAIN_MAX = 20
CANCEL_AGAIN_S = 0.05
"""A cancel is repeated so often, in such intervals, while a statement runs that was held when it came."""
_BACKLOG = 1024


class Relay:
    """All sessions of this DB node."""

    def __init__(
        self,
        settings: SqlSettings,
        address: BackendAddress,
        registry: BindingRegistry,
        listener_name: str,
        *,
        trusted_backend: bool,
        is_calling: Callable[[int], bool],
        make_hints: Callable[[str], SessionHints],
        book: StatementBook,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.listener_name = listener_name
        self.trusted_backend = trusted_backend
        self.make_hints = make_hints
        self.book = book
        self.draining = False
        self.handshakes: set[ClientHandshake] = set()
        self._address = address
        self._is_calling = is_calling
        self._sessions: set[Session] = set()
        self._by_key: dict[CancelKey, Session] = {}
        self._calls: dict[str, HiddenCalls] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = count(1)
        self._server: asyncio.Server | None = None
        self._emptied = asyncio.Event()

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def port(self) -> int:
        """The port in use, also when 0 was asked for."""
        assert self._server is not None, "not started"
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Raises SetupError."""
        loop = asyncio.get_running_loop()
        host, port = self.settings.host, self.settings.port
        try:
            self._server = await loop.create_server(lambda: ClientHandshake(self), host, port, backlog=_BACKLOG)
        except OSError as error:
            raise port_taken(host, port, "sql.port") from error

    # What a new client asks for

    def admit(self, handshake: ClientHandshake) -> bool:
        """Whether one more connection may begin."""
        if len(self.handshakes) >= HANDSHAKES_MAX:
            return False
        self.handshakes.add(handshake)
        return True

    def open_session(self, transport: asyncio.Transport, packet: StartupPacket, rest: bytes) -> None:
        """Connect a backend for the client; its reading is paused until then."""
        error: StrataError | None = None
        if self.draining:
            error = AdminShutdown("the DB node is shutting down")
        elif len(self._sessions) >= self.settings.clients_max:
            error = TooManyClients("sorry, too many clients already", hint="Raise sql.clients_max.")
        if error is not None:
            transport.write(error_response(error, Severity.FATAL))
            transport.close()
            return
        session = Session(self, f"sql-{next(self._numbers)}", packet, rest)
        self._sessions.add(session)
        session.client.attach(transport)
        transport.set_protocol(session.client)
        self._spawn(self._connect(session))

    async def _connect(self, session: Session) -> None:
        try:
            await self._address.connect(lambda: session.backend)
        except BackendUnreachable as error:
            log.warning("backend_unreachable", reason=error.message)
            session.end(error)
        else:
            session.start_login()

    def start_cancel(self, handshake: ClientHandshake, packet: StartupPacket) -> None:
        self._spawn(self._pass_cancel_on(handshake, packet))

    async def _pass_cancel_on(self, handshake: ClientHandshake, packet: StartupPacket) -> None:
        """PostgreSQL checks the key; unknown ones may be of a session of another DB node."""
        assert packet.cancel_key is not None
        session = self._by_key.get(packet.cancel_key)
        try:
            if session is not None:
                session.cancel_lookahead()
                if session.is_collecting:
                    await self._address.send_cancel(packet.raw)  # ours must not keep the client waiting
                await session.own_ended.wait()  # else our own statement would be cancelled, not the client's
            await self._address.send_cancel(packet.raw)
            if session is not None and session.binding is not None and session.binding.caller is not None:
                session.binding.caller.interrupt()
            for _ in range(CANCELS_AGAIN_MAX):
                if session is None or not session.is_cancelled:
                    break
                await asyncio.sleep(
                    CANCEL_AGAIN_S
                )  # the statement has just gone on: PostgreSQL may not have had it yet
                if session.is_cancelled:
                    await self._address.send_cancel(packet.raw)
        except BackendUnreachable as error:
            log.warning("cancel_failed", reason=error.message)
        finally:
            handshake.close()

    # What sessions tell

    def on_login(self, session: Session) -> None:
        if session.cancel_key is not None:
            self._by_key[session.cancel_key] = session

    def on_close(self, session: Session) -> None:
        self._sessions.discard(session)
        if session.cancel_key is not None and self._by_key.get(session.cancel_key) is session:
            del self._by_key[session.cancel_key]
        if not self._sessions:
            self._emptied.set()

    def calls_of(self, packet: StartupPacket) -> HiddenCalls:
        """What is known of the database that the packet asks for."""
        database = packet.parameters.get("database") or packet.parameters.get("user", "")
        if database not in self._calls and len(self._calls) >= DATABASES_MAX:
            del self._calls[next(iter(self._calls))]
        return self._calls.setdefault(database, HiddenCalls())

    def stop_inference(self, key: CancelKey) -> None:
        """The client of a session is gone: cancel its statement, if that waits for the model."""
        if self._is_calling(key.pid):
            self.stop_statement(key)

    def stop_statement(self, key: CancelKey) -> None:
        """Cancel what the backend of a session runs."""
        self._spawn(self._cancel(key))

    async def _cancel(self, key: CancelKey) -> None:
        try:
            await self._address.send_cancel(cancel_request(key))
        except BackendUnreachable as error:
            log.warning("cancel_failed", reason=error.message)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The end

    async def drain(self, grace_s: float) -> None:
        """Take no more clients, close idle sessions now and the others when idle, or after `grace_s`."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        self._end_sessions(only_idle=True)
        if self._sessions:
            self._emptied.clear()
            try:
                async with asyncio.timeout(grace_s):
                    await self._emptied.wait()
            except TimeoutError:
                log.warning("drain_grace_over", sessions=len(self._sessions))
        self._end_sessions(only_idle=False)

    def _end_sessions(self, *, only_idle: bool) -> None:
        error = AdminShutdown("terminating connection: the DB node is shutting down")
        for session in tuple(self._sessions):
            if session.is_idle or not only_idle:
                session.end(error)

    async def close(self) -> None:
        """End everything now."""
        await self.drain(0)
        for handshake in tuple(self.handshakes):
            handshake.close()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        self._server = None
