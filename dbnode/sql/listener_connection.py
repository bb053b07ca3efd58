"""One connection of the private listener: login (`listener_login`), then one command at a time.

A command is answered at once, or starts a call that PostgreSQL polls for (`polled_call`).
"""

from __future__ import annotations

import asyncio
import socket
import struct
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
    parse_command,
    reply,
)
from dbnode.sql.errors import MessageTooLong, ProtocolViolation
from dbnode.sql.explain import Explaining
from dbnode.sql.hints import PassEnded, StatementHints
from dbnode.sql.listener_login import ListenerLogin
from dbnode.sql.memo import Hint
from dbnode.sql.messages import (
    Kind,
    MessageReader,
    Severity,
    cstring,
    error_response,
    message,
    ready_for_query,
)
from dbnode.sql.polled_call import PolledCall
from dbnode.sql.service import InferCall
from dbnode.sql.sockets import keep_alive
from dbnode.sql.statement_meter import StatementMeter
from dbnode.sql.tls_transport import TlsTransport
from dbnode.sql.topics import Asked, Topic
from stratakv.errors import ContextTooLong, Overloaded, PermissionDenied, StrataError, Unavailable
from stratakv.log import EventLogger

if TYPE_CHECKING:
    from dbnode.sql.listener import Listener

log = EventLogger(__name__)

LOGIN_TIMEOUT_S = 10.0
_PEER_CREDENTIALS = struct.Struct("3i")
_NULL_ANSWER = reply(Status.OK)


class ListenerConnection(asyncio.Protocol):
    """dblink's connection of one PostgreSQL session."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._login = ListenerLogin(listener.verifier, listener.tls)
        self._messages = MessageReader(listener.limits.command_bytes_max, skip_too_long=True)
        self._name = f"direct-{listener.next_number()}"
        self._binding: SessionBinding | None = None
        self._call = PolledCall(lambda data: self._transport.write(data), listener.tasks)
        self._explaining = Explaining(listener.explainer, listener.explaining)
        self._login_timer: asyncio.TimerHandle | None = None

    @property
    def calling_pid(self) -> int | None:
        """Backend whose call runs here."""
        return self._call.pid

    @property
    def _session_name(self) -> str:
        return self._binding.name if self._binding is not None else self._name

    # Connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody is there, or has ended the TLS handshake."""
        self._transport = cast(asyncio.Transport, transport)
        if isinstance(transport, TlsTransport):
            self._login.encrypted()
            return
        listener = self._listener
        self._login_timer = asyncio.get_running_loop().call_later(LOGIN_TIMEOUT_S, self.close)
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
        self._end_login_timer()
        self._call.drop()
        self._explaining.drop()
        if self._binding is not None and self._binding.caller is self:
            self._binding.caller = None

    def close(self) -> None:
        """End the connection; a call that runs is stopped."""
        self._end_login_timer()
        self._call.drop()
        self._transport.close()

    def _refuse(self, error: StrataError) -> None:
        self._transport.write(error_response(error, Severity.FATAL))
        self.close()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        try:
            if self._login.is_done:
                self._messages.feed(data)
                self._read_messages()
            else:
                self._on_login_data(data)
        except (ProtocolViolation, PermissionDenied) as error:
            log.warning("listener_connection_refused", reason=error.message)
            self._refuse(error)

    # Login

    def _on_login_data(self, data: bytes) -> None:
        login = self._login
        self._transport.write(login.feed(data))
        if login.is_done:
            self._end_login_timer()
        elif login.has_left:
            self.close()
        elif login.is_tls_due:
            self._start_tls()

    def _end_login_timer(self) -> None:
        if self._login_timer is not None:
            self._login_timer.cancel()

    def _start_tls(self) -> None:
        assert self._listener.tls is not None
        self._transport.pause_reading()
        tls = self._listener.tls.wrap(self._transport, self)
        tls.opened.add_done_callback(self._on_tls_opened)
        tls.start()

    def _on_tls_opened(self, opened: asyncio.Future[None]) -> None:
        if (error := opened.exception()) is not None:
            log.warning("listener_connection_refused", reason=f"TLS fails: {error}")
            self.connection_lost(None)

    # Commands

    def _read_messages(self) -> None:
        while not self._transport.is_closing():
            try:
                parsed = self._messages.next_message()
            except MessageTooLong:
                self._call.answer_error(_prompt_too_long(self._listener.limits.prompt_bytes_max))
                continue
            if parsed is None:
                return
            kind, payload = parsed
            if kind == Kind.TERMINATE:
                self.close()
            else:
                self._on_query(kind, payload)

    def _on_query(self, kind: int, payload: bytes) -> None:
        if kind != Kind.QUERY or not payload.endswith(b"\0"):
            raise ProtocolViolation("only simple queries are known here")
        try:
            command = parse_command(payload[:-1], self._login.cluster)
            match command:
                case Infer():
                    self._start_call(command)
                case Poll():
                    self._call.poll()
                case Bind():
                    self._binding = self._listener.registry.redeem(command.nonce, command.pid, self)
                    self._transport.write(reply(Status.OK))
                case Explain():
                    self._call.drop()
                    begun = self._explaining.begin(
                        command.query, command.names, command.role, command.database, command.pid
                    )
                    self._transport.write(reply(Status.OK, begun))
                case Probe():
                    self._explaining.probe(command)
                    self._transport.write(reply(Status.OK))
                case Explained():
                    self._call.drop()
                    self._call.start(self._explaining.end(command), command.pid)
                case Ask():
                    self._start_asked(command)
                case SetEncoding():
                    self._transport.write(message(b"C", cstring("SET")) + ready_for_query())
        except ProtocolViolation:
            raise
        except StrataError as error:
            self._call.answer_error(error)

    def _start_call(self, command: Infer) -> None:
        self._call.drop()
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
        self._call.start(_run(listener, call, hints, hint, meter), command.pid)
        if hints is not None and hints.is_streaming:
            self._call.answer_wait(Status.FLUSH)

    def _start_asked(self, command: Ask) -> None:
        self._call.drop()
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
        self._call.start(_answer_asked(topic, asked), command.pid)

    def _answer_pass(self, hints: StatementHints, command: Infer) -> None:
        """A call of a collect pass: NULL stands for what is not known yet."""
        answer = hints.collect(command)
        self._transport.write(_NULL_ANSWER if answer is None else answer_reply(answer))

    # What the gateway does with a bound session

    def interrupt(self) -> None:
        """The client sent a cancel."""
        self._call.interrupt()

    def statement_ended(self) -> None:
        """Nobody waits for the call any more."""
        self._explaining.drop()
        self._call.end()


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
