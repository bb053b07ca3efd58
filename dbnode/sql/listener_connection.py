"""One connection of the private listener: login, then one command at a time.

A call is polled: every answer comes within HOLD_S, so that PostgreSQL can look for a cancel or a timeout in between. A call
that is not polled again is nobody's any more and is stopped.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, cast

from dbnode.sql.binding import SessionBinding
from dbnode.sql.commands import (
    Ask,
    Bind,
    Explain,
    Explained,
    Infer,
    Poll,
    Probe,
    SetEncoding,
    Status,
    answer_reply,
    cluster_of,
    parse_command,
    reply,
)
from dbnode.sql.errors import MessageTooLong, ProtocolViolation, TlsRequired
from dbnode.sql.explain import Explaining
from dbnode.sql.hints import PassEnded, StatementHints
from dbnode.sql.memo import Hint
from dbnode.sql.messages import (
    AuthenticationCode,
    Kind,
    MessageReader,
    Severity,
    authentication,
    cstring,
    error_response,
    message,
    parameter_status,
    ready_for_query,
)
from dbnode.sql.scram import MECHANISM, MECHANISM_PLUS, ScramFailed, ScramServer
from dbnode.sql.service import InferCall
from dbnode.sql.sockets import keep_alive
from dbnode.sql.startup import TLS_DECLINED, TLS_GIVEN, StartupKind, StartupReader
from dbnode.sql.statement_meter import StatementMeter
from dbnode.sql.tls_transport import TlsTransport
from dbnode.sql.topics import Asked, Topic
from stratakv.errors import Cancelled, ContextTooLong, Overloaded, PermissionDenied, StrataError, Unavailable
from stratakv.log import EventLogger

if TYPE_CHECKING:
    from dbnode.sql.listener import Listener
    from dbnode.sql.server_tls import ServerTls

log = EventLogger(__name__)

HOLD_S = 0.15
"""Longest wait before `wait` is answered."""
ABANDON_S = 0.2
"""A call that is not polled for so long is stopped …"""
ABANDON_SURE_S = 0.05
"""… after another look so much later: the poll may lie unread in a busy process."""
LOGIN_TIMEOUT_S = 10.0
_LOGIN_MESSAGE_BYTES_MAX = 4096
_NONCE_BYTES = 18
_PEER_CREDENTIALS = struct.Struct("3i")
_SERVER_VERSION = "15.0"
_NULL_ANSWER = reply(Status.OK)


class _Phase(enum.Enum):
    STARTUP = enum.auto()
    SCRAM_FIRST = enum.auto()
    SCRAM_FINAL = enum.auto()
    READY = enum.auto()


class ListenerConnection(asyncio.Protocol):
    """dblink's connection of one PostgreSQL session."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._phase = _Phase.STARTUP
        self._startup = StartupReader()
        self._declined: set[StartupKind] = set()
        self._cluster = ""
        """Of PostgreSQL that calls; empty if its functions do not tell."""
        self._messages = MessageReader(_LOGIN_MESSAGE_BYTES_MAX)
        self._mechanism = MECHANISM if listener.tls is None else MECHANISM_PLUS
        digest = None if listener.tls is None else listener.tls.end_point.digest
        self._scram = ScramServer(listener.verifier, secrets.token_urlsafe(_NONCE_BYTES), digest)
        self._name = f"direct-{listener.next_number()}"
        self._binding: SessionBinding | None = None
        self._call: asyncio.Task[str] | None = None
        self._call_pid: int | None = None
        self._explaining = Explaining(listener.explainer, listener.explaining)
        self._is_asked = False
        """PostgreSQL waits for our answer now."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def calling_pid(self) -> int | None:
        """Backend whose call runs here."""
        return self._call_pid if self._call is not None else None

    @property
    def _session_name(self) -> str:
        return self._binding.name if self._binding is not None else self._name

    # Connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody is there, or has ended the TLS handshake."""
        self._transport = cast(asyncio.Transport, transport)
        if isinstance(transport, TlsTransport):
            return
        listener = self._listener
        self._set_timer(LOGIN_TIMEOUT_S, self.close)
        peer = transport.get_extra_info("socket")
        if peer.family == socket.AF_UNIX:
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
            uid = _PEER_CREDENTIALS.unpack(credentials)[1]
            if uid != listener.postgres_uid:
                log.warning("listener_peer_refused", uid=uid, expected_uid=listener.postgres_uid)
                self._refuse(PermissionDenied("this socket is for PostgreSQL only"))
                return
        keep_alive(transport)
        if len(listener.connections) >= listener.limits.connections_max:
            self._refuse(Overloaded("the DB node takes no more connections"))
            return
        listener.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.connections.discard(self)
        self._drop_call()
        self._explaining.drop()
        if self._binding is not None and self._binding.caller is self:
            self._binding.caller = None

    def close(self) -> None:
        """End the connection; a call that runs is stopped."""
        self._drop_call()
        self._transport.close()

    def _refuse(self, error: StrataError) -> None:
        self._transport.write(error_response(error, Severity.FATAL))
        self.close()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        try:
            if self._phase is _Phase.STARTUP:
                self._startup.feed(data)
                self._read_startup()
            else:
                self._messages.feed(data)
            if self._phase is not _Phase.STARTUP:
                self._read_messages()
        except (ProtocolViolation, PermissionDenied) as error:
            log.warning("listener_connection_refused", reason=error.message)
            self._refuse(error)

    def _read_startup(self) -> None:
        while self._phase is _Phase.STARTUP and (packet := self._startup.next_packet()) is not None:
            if packet.kind is StartupKind.SESSION:
                self._cluster = cluster_of(packet.parameters.get("application_name", ""))
                self._ask_for_key()
            elif packet.kind is StartupKind.CANCEL:
                raise ProtocolViolation("nothing can be cancelled here")
            elif packet.kind is StartupKind.TLS and self._listener.tls is not None:
                self._start_tls(self._listener.tls)
            elif packet.kind in self._declined:
                raise ProtocolViolation("encryption was declined already")
            else:
                self._declined.add(packet.kind)
                self._transport.write(TLS_DECLINED)

    def _start_tls(self, offered: ServerTls) -> None:
        if self._startup.take_rest() or isinstance(self._transport, TlsTransport):
            raise ProtocolViolation("received unencrypted data after a request for TLS")
        self._transport.pause_reading()
        self._transport.write(TLS_GIVEN)
        tls = offered.wrap(self._transport, self)
        tls.opened.add_done_callback(self._on_tls_opened)
        tls.start()

    def _on_tls_opened(self, opened: asyncio.Future[None]) -> None:
        if (error := opened.exception()) is not None:
            log.warning("listener_connection_refused", reason=f"TLS fails: {error}")
            self.connection_lost(None)

    def _ask_for_key(self) -> None:
        if self._listener.tls is not None and not isinstance(self._transport, TlsTransport):
            raise TlsRequired(
                "the DB node's listener demands TLS, which this database does not know of",
                hint="Run `stratakv install` again, with the settings of the DB node.",
            )
        self._phase = _Phase.SCRAM_FIRST
        self._transport.write(authentication(AuthenticationCode.SASL, cstring(self._mechanism) + b"\0"))
        self._messages.feed(self._startup.take_rest())

    def _read_messages(self) -> None:
        while not self._transport.is_closing():
            try:
                parsed = self._messages.next_message()
            except MessageTooLong:
                self._answer_error(_prompt_too_long(self._listener.limits.prompt_bytes_max))
                continue
            if parsed is None:
                return
            kind, payload = parsed
            if kind == Kind.TERMINATE:
                self.close()
            elif self._phase is _Phase.READY:
                self._on_query(kind, payload)
            else:
                self._on_password(kind, payload)

    # Login

    def _on_password(self, kind: int, payload: bytes) -> None:
        if kind != Kind.PASSWORD:
            raise ProtocolViolation("expected an answer to the authentication request")
        if self._phase is _Phase.SCRAM_FIRST:
            mechanism, _, rest = payload.partition(b"\0")
            if mechanism != self._mechanism.encode():
                raise ScramFailed(f"expected {self._mechanism}")
            server_first = self._scram.first(rest[4:], self._mechanism)
            self._phase = _Phase.SCRAM_FINAL
            self._transport.write(authentication(AuthenticationCode.SASL_CONTINUE, server_first))
            return
        server_final = self._scram.final(payload)
        self._phase = _Phase.READY
        self._set_timer(None)
        self._messages = MessageReader(self._listener.limits.command_bytes_max, skip_too_long=True)
        self._transport.write(
            authentication(AuthenticationCode.SASL_FINAL, server_final)
            + authentication(AuthenticationCode.OK)
            + parameter_status("server_version", _SERVER_VERSION)
            + parameter_status("server_encoding", "UTF8")
            + parameter_status("client_encoding", "UTF8")
            + parameter_status("standard_conforming_strings", "on")
            + ready_for_query()
        )

    # Commands

    def _on_query(self, kind: int, payload: bytes) -> None:
        if kind != Kind.QUERY or not payload.endswith(b"\0"):
            raise ProtocolViolation("only simple queries are known here")
        try:
            command = parse_command(payload[:-1], self._cluster)
            match command:
                case Infer():
                    self._start_call(command)
                case Poll():
                    self._on_poll()
                case Bind():
                    self._binding = self._listener.registry.redeem(command.nonce, command.pid, self)
                    self._transport.write(reply(Status.OK))
                case Explain():
                    self._drop_call()
                    begun = self._explaining.begin(
                        command.query, command.names, command.role, command.database, command.pid
                    )
                    self._transport.write(reply(Status.OK, begun))
                case Probe():
                    self._explaining.probe(command)
                    self._transport.write(reply(Status.OK))
                case Explained():
                    self._drop_call()
                    self._start(self._explaining.end(command), command.pid)
                case Ask():
                    self._start_asked(command)
                case SetEncoding():
                    self._transport.write(message(b"C", cstring("SET")) + ready_for_query())
        except ProtocolViolation:
            raise
        except StrataError as error:
            self._answer_error(error)

    def _start_call(self, command: Infer) -> None:
        self._drop_call()
        self._explaining.drop()  # what was explained has ended without telling us
        listener = self._listener
        if listener.draining:
            raise Unavailable("the DB node is shutting down", hint="Run the statement again.")
        if len(command.prompt.encode()) > listener.limits.prompt_bytes_max:
            raise _prompt_too_long(listener.limits.prompt_bytes_max)
        session_hints = self._binding.hints if self._binding is not None else None
        hints = session_hints.statement if session_hints is not None else None
        meter = listener.book.called(self._session_name, command.role, command.database, command.login)
        if hints is not None and hints.is_collecting:
            self._answer_pass(hints, command)
            return
        if hints is not None and hints.is_planning:
            self._transport.write(reply(Status.OK))
            return
        hint = hints.find(command) if hints is not None else None
        if hint is not None and hint.answer is not None:
            meter.count_call(is_known=True)
            self._transport.write(answer_reply(hint.answer))
            return
        if listener.is_full:
            raise Overloaded(
                f"{listener.limits.calls_max} infer() calls are in progress, which is the limit",
                hint="Run fewer statements at a time, or raise sql.calls_waiting_max.",
            )
        call = command.call(self._session_name)
        meter.count_call(is_known=hint is not None and (hint.is_ahead or hint.is_started))
        self._start(_run(listener, call, hints, hint, meter), command.pid)
        if hints is not None and hints.is_streaming:
            self._answer_wait(Status.FLUSH)

    def _start_asked(self, command: Ask) -> None:
        self._drop_call()
        listener = self._listener
        topic = listener.topics.get(command.topic)
        if topic is None or listener.draining:
            raise Unavailable(
                f"the DB node does not answer about {command.topic!r} now", hint="Run the statement again."
            )
        hints = self._binding.hints.statement if self._binding is not None and self._binding.hints is not None else None
        if topic.has_effects and hints is not None and (hints.is_collecting or hints.is_planning):
            raise PassEnded("what has effects waits for the statement itself")
        if listener.is_full:
            raise Overloaded(f"{listener.limits.calls_max} calls are in progress, which is the limit")
        asked = Asked(command.payload, command.role, command.database, self._session_name, command.login)
        self._start(_answer_asked(topic, asked), command.pid)

    def _start(self, work: Coroutine[None, None, str], pid: int) -> None:
        """Run what PostgreSQL polls for."""
        task = self._loop.create_task(work)
        self._listener.tasks.add(task)
        task.add_done_callback(self._listener.tasks.discard)
        task.add_done_callback(self._on_done)
        self._call, self._call_pid = task, pid
        self._ask()

    def _answer_pass(self, hints: StatementHints, command: Infer) -> None:
        """A call of a collect pass: NULL stands for what is not known yet."""
        answer = hints.collect(command)
        self._transport.write(_NULL_ANSWER if answer is None else answer_reply(answer))

    def _on_poll(self) -> None:
        if self._call is None:
            self._transport.write(reply(Status.GONE))
        else:
            self._ask()

    def _ask(self) -> None:
        assert self._call is not None
        if self._call.done():
            self._answer(self._call)
        else:
            self._is_asked = True
            self._set_timer(HOLD_S, self._answer_wait)

    def _on_done(self, task: asyncio.Task[str]) -> None:
        if task is self._call and self._is_asked:
            self._answer(task)
        elif task is not self._call and not task.cancelled():
            task.exception()  # nobody waits for it any more

    def _answer(self, task: asyncio.Task[str]) -> None:
        self._call = None
        if task.cancelled():
            self._answer_error(Cancelled("the inference was cancelled"))
        elif (error := task.exception()) is not None:
            self._answer_error(error if isinstance(error, StrataError) else StrataError("internal error"))
        else:
            self._is_asked = False
            self._set_timer(None)
            self._transport.write(answer_reply(task.result()))

    def _answer_error(self, error: StrataError) -> None:
        self._is_asked = False
        self._set_timer(None)
        self._transport.write(reply(Status.ERROR, error=error))

    def _answer_wait(self, status: Status = Status.WAIT) -> None:
        self._is_asked = False
        self._transport.write(reply(status))
        self._set_timer(ABANDON_S, self._suspect)

    def _suspect(self) -> None:
        self._set_timer(ABANDON_SURE_S, self._drop_call)

    def _drop_call(self) -> None:
        self._set_timer(None)
        self._is_asked = False
        task, self._call = self._call, None
        if task is not None:
            task.cancel()

    def _set_timer(self, delay_s: float | None, action: Callable[[], None] | None = None) -> None:
        """At most one timer runs."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if delay_s is None or action is None else self._loop.call_later(delay_s, action)

    # What the gateway does with a bound session

    def interrupt(self) -> None:
        """The client sent a cancel: stop the call, and let PostgreSQL look for its cancel at once."""
        if self._call is not None:
            self._call.cancel()
            if self._is_asked:
                self._answer_wait()

    def statement_ended(self) -> None:
        """Nobody waits for the call any more."""
        self._explaining.drop()
        if self._call is not None:
            if self._is_asked:
                self._transport.write(reply(Status.GONE))
            self._drop_call()


async def _run(
    listener: Listener, call: InferCall, hints: StatementHints | None, hint: Hint | None, meter: StatementMeter
) -> str:
    try:
        with meter.waiting():
            if hints is not None and hint is not None:
                return await hints.answer(hint)
            return await listener.service.infer_text(call)
    except StrataError:
        raise
    except Exception:
        log.exception("infer_failed", session=call.session, database=call.database)
        raise
    finally:
        listener.book.finish_own(meter)


async def _answer_asked(topic: Topic, asked: Asked) -> str:
    try:
        return await topic.answer(asked)
    except StrataError:
        raise
    except Exception:
        log.exception("asked_failed", session=asked.session, database=asked.database)
        raise


def _prompt_too_long(bytes_max: int) -> StrataError:
    return ContextTooLong(
        f"the prompt is longer than {bytes_max} bytes",
        hint="Shorten it, or raise sql.prompt_bytes_max.",
        param="prompt",
    )
