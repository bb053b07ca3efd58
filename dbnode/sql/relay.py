"""The port that PostgreSQL clients connect to: opens sessions, passes cancels on, bounds and drains. Started by `SqlFront`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import count

from dbnode.sql.admin.console import AdminConsole
from dbnode.sql.admin.login import wants_admin, with_database
from dbnode.sql.auth_file import AuthFile
from dbnode.sql.backend import BackendAddress
from dbnode.sql.binding import BindingRegistry
from dbnode.sql.errors import AdminShutdown, BackendUnreachable, IdleTimeout, TooManyClients
from dbnode.sql.handshake import ClientHandshake
from dbnode.sql.hidden_calls import DATABASES_MAX, HiddenCalls
from dbnode.sql.messages import Severity, error_response
from dbnode.sql.passthrough import Passage
from dbnode.sql.server_tls import ClientTls
from dbnode.sql.session import Session
from dbnode.sql.session_facts import Traffic
from dbnode.sql.session_hints import SessionHints
from dbnode.sql.startup import TLS_DECLINED, TLS_GIVEN, CancelKey, StartupPacket, cancel_request
from dbnode.sql.statement_meter import StatementBook
from stratakv.errors import SetupError, StrataError
from stratakv.log import EventLogger
from stratakv.process import port_taken
from stratakv.settings import SqlSettings, TlsMode

log = EventLogger(__name__)

HANDSHAKES_MAX = 1000
"""Connections that are no session yet: logins that begin, and cancels."""
CANCELS_AGAIN_MAX = 20
CANCEL_AGAIN_S = 0.05
"""A cancel is repeated so often, in such intervals, while a statement runs that was held when it came."""
LOOK_S = 0.05
LOOKS_MAX = 100
"""How often, and how many times, the statement of a client that is gone is looked for at the private listener."""
_BACKLOG = 1024
_IDLE_CHECKS = 4
"""Looks at the sessions within one idle timeout."""
_IDLE_CHECK_S_MAX = 10.0


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
        login_database: str,
    ) -> None:
        """Raises SetupError."""
        self.settings = settings
        self.registry = registry
        self.listener_name = listener_name
        self.trusted_backend = trusted_backend
        self.make_hints = make_hints
        self.book = book
        self.traffic: dict[str, Traffic] = {}
        """By database."""
        self._login_database = login_database
        self.draining = False
        self.handshakes: set[ClientHandshake] = set()
        self.passages: set[Passage] = set()
        """Clients whose TLS is PostgreSQL's own."""
        self.tls = ClientTls(settings)
        self.auth_file = AuthFile(settings.auth_file)
        self._address = address
        self._is_calling = is_calling
        self._sessions: set[Session] = set()
        self._by_key: dict[CancelKey, Session] = {}
        self._calls: dict[str, HiddenCalls] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = count(1)
        self._server: asyncio.Server | None = None
        self._emptied = asyncio.Event()
        if settings.tls_mode is TlsMode.PASSTHROUGH and address.socket_path is not None:
            raise SetupError(
                "sql.tls_mode = passthrough: PostgreSQL has no TLS on a Unix socket",
                hint="Give sql.backend_url a host.",
            )

    @property
    def backend_address(self) -> BackendAddress:
        """Where PostgreSQL is."""
        return self._address

    @property
    def sessions(self) -> tuple[Session, ...]:
        return tuple(self._sessions)

    def traffic_of(self, database: str) -> Traffic:
        """PostgreSQL knows the database, so they are not endlessly many."""
        return self.traffic.setdefault(database, Traffic())

    @property
    def num_sessions(self) -> int:
        return len(self._sessions) + len(self.passages)

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
        if self.settings.client_idle_timeout_s > 0:
            self._spawn(self._end_idle_sessions(self.settings.client_idle_timeout_s))

    def reload(self) -> None:
        """Read certificate and verifiers again; sessions that are open keep theirs."""
        for what in (self.tls, self.auth_file):
            try:
                what.reload()
            except SetupError as error:
                log.error("reload_failed", reason=error.message, hint=error.hint)
        log.info("reloaded")

    # What a new client asks for

    def admit(self, handshake: ClientHandshake) -> bool:
        """Whether one more connection may begin."""
        if len(self.handshakes) >= HANDSHAKES_MAX:
            return False
        self.handshakes.add(handshake)
        return True

    def open_session(self, transport: asyncio.Transport, packet: StartupPacket, rest: bytes) -> None:
        """Connect a backend for the client; its reading is paused until then."""
        if (error := self._why_not()) is not None:
            transport.write(error_response(error, Severity.FATAL))
            transport.close()
            return
        is_admin = wants_admin(packet, self.settings.admin_database)
        if is_admin:
            packet = with_database(packet, self._login_database)
        session = Session(self, f"sql-{next(self._numbers)}", packet, rest)
        if is_admin:
            session.console = AdminConsole(session)
        self._sessions.add(session)
        session.client.attach(transport)
        transport.set_protocol(session.client)
        self._spawn(self._connect(session))

    def _why_not(self) -> StrataError | None:
        """Why no session may be opened."""
        if self.draining:
            return AdminShutdown("the DB node is shutting down")
        if self.num_sessions >= self.settings.clients_max:
            return TooManyClients("sorry, too many clients already", hint="Raise sql.clients_max.")
        return None

    async def _connect(self, session: Session) -> None:
        try:
            await self._address.connect(lambda: session.backend)
        except BackendUnreachable as error:
            log.warning("backend_unreachable", reason=error.message)
            session.end(error)
        else:
            session.start_login()

    def start_passage(self, handshake: ClientHandshake, transport: asyncio.Transport, received: bytes) -> None:
        """Let PostgreSQL answer a client that asks for TLS, or has begun with it; its reading is paused."""
        self._spawn(self._open_passage(handshake, transport, received))

    async def _open_passage(self, handshake: ClientHandshake, transport: asyncio.Transport, received: bytes) -> None:
        """To a client that awaits TLS no error can be told."""
        reason = self._why_not()
        if reason is None:
            try:
                backend, answer = await self._address.open_tls_passage(direct=bool(received))
            except BackendUnreachable as error:
                reason = error
        if reason is not None:
            log.warning("passage_refused", reason=reason.message)
            handshake.close()
        elif transport.is_closing():
            backend.abort()
        elif answer == TLS_DECLINED:
            backend.abort()
            handshake.decline()
            handshake.go_on()
        elif answer != (b"" if received else TLS_GIVEN):
            backend.abort()
            handshake.close()
        else:
            handshake.hand_over()
            transport.write(answer)
            passage = Passage(self)
            self.passages.add(passage)
            passage.start(transport, backend, received)

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
            if session is not None:
                await self._cancel_until_ended(session)
        except BackendUnreachable as error:
            log.warning("cancel_failed", reason=error.message)
        finally:
            handshake.close()

    def repeat_cancel(self, session: Session) -> None:
        """A cancel has hit a statement of the gateway's: let it hit the one that it is for, too."""
        self._spawn(self._cancel_until_ended(session))

    async def _cancel_until_ended(self, session: Session) -> None:
        """The statement has just gone on, or is about to: PostgreSQL may not have had it yet."""
        await session.own_ended.wait()
        for _ in range(CANCELS_AGAIN_MAX):
            if not session.is_cancelled:
                break
            await asyncio.sleep(CANCEL_AGAIN_S)
            if session.is_cancelled and session.cancel_key is not None:
                await self._cancel(session.cancel_key)

    async def _end_idle_sessions(self, timeout_s: float) -> None:
        """A look now and then, so that no message has to be timed: a session gets up to a quarter more."""
        loop = asyncio.get_running_loop()
        idle_since: dict[Session, float] = {}
        while True:
            await asyncio.sleep(min(timeout_s / _IDLE_CHECKS, _IDLE_CHECK_S_MAX))
            now = loop.time()
            before, idle_since = idle_since, {}
            for session in tuple(self._sessions):
                if not session.is_idle or session.client.is_touched:
                    session.client.is_touched = False
                    idle_since[session] = now
                elif now - before.get(session, now) >= timeout_s:
                    session.end(IdleTimeout("terminating connection due to idle-session timeout of the DB node"))
                else:
                    idle_since[session] = before.get(session, now)

    # What sessions tell

    def on_login(self, session: Session) -> None:
        if session.cancel_key is not None:
            self._by_key[session.cancel_key] = session

    def on_close(self, session: Session) -> None:
        self._sessions.discard(session)
        if session.cancel_key is not None and self._by_key.get(session.cancel_key) is session:
            del self._by_key[session.cancel_key]
        self._check_emptied()

    def on_passage_close(self, passage: Passage) -> None:
        self.passages.discard(passage)
        self._check_emptied()

    def _check_emptied(self) -> None:
        if not self.num_sessions:
            self._emptied.set()

    def calls_of(self, packet: StartupPacket) -> HiddenCalls:
        """What is known of the database that the packet asks for."""
        database = packet.parameters.get("database") or packet.parameters.get("user", "")
        if database not in self._calls and len(self._calls) >= DATABASES_MAX:
            del self._calls[next(iter(self._calls))]
        return self._calls.setdefault(database, HiddenCalls())

    def stop_inference(self, key: CancelKey) -> None:
        """The client of a session is gone: cancel its statement as soon as that waits for the model."""
        self._spawn(self._cancel_when_calling(key))

    def stop_statement(self, key: CancelKey) -> None:
        """Cancel what the backend of a session runs."""
        self._spawn(self._cancel(key))

    async def _cancel_when_calling(self, key: CancelKey) -> None:
        """It may be between two calls just now. PostgreSQL itself notices when it has rows to send."""
        for _ in range(LOOKS_MAX):
            if self._is_calling(key.pid):
                await self._cancel(key)
                return
            await asyncio.sleep(LOOK_S)

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
        if self.num_sessions:
            self._emptied.clear()
            try:
                async with asyncio.timeout(grace_s):
                    await self._emptied.wait()
            except TimeoutError:
                log.warning("drain_grace_over", sessions=self.num_sessions)
        for passage in tuple(self.passages):
            passage.close()
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
