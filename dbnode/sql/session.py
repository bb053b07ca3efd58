"""One client and its one backend connection: bytes go through as they are, both ways.

After login only message boundaries are followed, to know when the session is idle. Made by `Relay`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dbnode.sql.admin.console import AdminConsole
from dbnode.sql.binding import SessionBinding
from dbnode.sql.client_batch import HELD_BYTES_MAX, may_prepare_opening
from dbnode.sql.errors import AdminShutdown, BackendLost, StartupTimeout
from dbnode.sql.hidden_calls import HiddenCalls
from dbnode.sql.login import Legs, Login
from dbnode.sql.looking_ahead import Lookahead
from dbnode.sql.messages import (
    TRANSACTION_FAILED,
    TRANSACTION_IDLE,
    Kind,
    Severity,
    error_response,
    message,
    ready_for_query,
)
from dbnode.sql.normalise import normalised
from dbnode.sql.notice_filter import NoticeFilter
from dbnode.sql.own_exchange import OwnExchange
from dbnode.sql.own_statements import Within
from dbnode.sql.preparation import Preparation
from dbnode.sql.session_facts import Traffic
from dbnode.sql.session_hints import SessionHints
from dbnode.sql.sides import FOLLOWED, BackendSide, ClientSide, Phase
from dbnode.sql.startup import CancelKey, StartupPacket
from dbnode.sql.tls_transport import end_point_of
from stratakv.errors import StrataError
from stratakv.log import EventLogger

if TYPE_CHECKING:
    from dbnode.sql.relay import Relay

log = EventLogger(__name__)

_CLIENT_WATCHED = frozenset({Kind.QUERY, Kind.SYNC, Kind.FUNCTION_CALL, Kind.TERMINATE})
_BACKEND_WATCHED = frozenset({Kind.READY_FOR_QUERY, Kind.COPY_IN_RESPONSE, Kind.ERROR_RESPONSE})
_SETTLED = frozenset({0, Kind.PASSWORD, Kind.QUERY, Kind.SYNC, Kind.FUNCTION_CALL})
"""Kinds of a client's last message after which nothing is half said."""
_TEXT_BEARING = frozenset({int(Kind.QUERY), int(Kind.PARSE), int(Kind.CLOSE)})
"""Kinds of first messages that are worth a search: drivers send Close ahead of the next Parse."""
# Plain numbers: what every message is compared with must not be looked up in an enum.
_READY_FOR_QUERY, _TERMINATE = int(Kind.READY_FOR_QUERY), int(Kind.TERMINATE)
_DESCRIBED = frozenset({Kind.ROW_DESCRIPTION, Kind.NO_DATA})


class Session:
    """State of both sides; every change of phase is here."""

    def __init__(self, relay: Relay, name: str, packet: StartupPacket, rest: bytes) -> None:
        self.relay = relay
        self.name = name
        self.packet = packet
        self.held = rest
        """What the client sent and the backend shall have later."""
        self.phase = Phase.CONNECTING
        self.client = ClientSide(self, _CLIENT_WATCHED)
        self.backend = BackendSide(self, _BACKEND_WATCHED)
        self.cancel_key: CancelKey | None = None
        self.binding: SessionBinding | None = None
        self.exchange: OwnExchange | None = None
        """Statements of the gateway's own that the backend runs: what it sends is the answer to them."""
        self.notices: NoticeFilter | None = None
        """While a statement streams."""
        self.own_ended = asyncio.Event()
        """Clear while the backend runs a statement of the gateway's own, or may."""
        self.own_ended.set()
        self.calls = HiddenCalls(is_stale=False)
        """What is known of the database."""
        self.preparation = Preparation(self)
        self.lookahead: Lookahead | None = None
        """Once there is a session to look ahead in."""
        self.console: AdminConsole | None = None
        """Of a client of the admin database."""
        self.traffic = Traffic()
        """Of its database, once it is let in."""
        self.connected_at_s = time.time()
        self._is_metered = False
        """A statement that may call infer() is under way."""
        self._on_own_done: Callable[[], None]
        user = packet.parameters.get("user", "")
        self._login = Login(trusted=relay.trusted_backend, user=user, verifier=relay.auth_file.get(user))
        self._num_expected = 0
        """ReadyForQuery that are still to come."""
        self._timer = asyncio.get_running_loop().call_later(relay.settings.startup_timeout_s, self._on_timeout)

    @property
    def is_idle(self) -> bool:
        """Outside a transaction, with nothing under way in either direction."""
        return self.phase is Phase.ADMIN or (
            self.is_between and self.backend.walker.transaction_status == TRANSACTION_IDLE
        )

    @property
    def is_busy(self) -> bool:
        """PostgreSQL has something to do for it."""
        return bool(self._num_expected) or self.exchange is not None

    @property
    def is_between(self) -> bool:
        """Nothing is under way, and the transaction, if there is one, has not failed."""
        return self._is_quiet and self.client.walker.last_kind in _SETTLED

    @property
    def is_behind(self) -> bool:
        """What the client sends next stands in a pipeline behind what PostgreSQL still does."""
        return (
            self.phase is Phase.OPEN
            and self._num_expected > 0
            and self.client.walker.at_boundary
            and self.client.walker.last_kind in _SETTLED
        )

    @property
    def is_bound(self) -> bool:
        """PostgreSQL's calls are known to be of this session."""
        return self.binding is not None and self.binding.caller is not None

    @property
    def is_described(self) -> bool:
        """The same, but for a Describe that is answered and whose batch is still open."""
        return self._is_quiet and self.backend.walker.last_kind in _DESCRIBED

    @property
    def within(self) -> Within:
        """Where a statement of the gateway's would run; the session is between statements."""
        return Within(self.backend.walker.transaction_status)

    @property
    def _is_quiet(self) -> bool:
        return (
            self.phase is Phase.OPEN
            and self._num_expected == 0
            and self.backend.walker.transaction_status != TRANSACTION_FAILED
            and self.client.walker.at_boundary
            and self.backend.walker.at_boundary
        )

    # Login

    def start_login(self) -> None:
        """The backend is connected."""
        if self.phase is not Phase.CONNECTING:
            self.backend.close()
            return
        self.phase = Phase.LOGIN
        self._login.legs = Legs(end_point_of(self.client.transport), end_point_of(self.backend.transport))
        self.backend.write(self.packet.raw)
        self._feed_held()
        self.client.read_on()

    def on_login_data(self, data: bytes) -> None:
        for_client, for_backend, rest = self._login.feed(data)
        self.client.write(for_client)
        self.backend.write(for_backend)
        if not self._login.done:
            return
        self._timer.cancel()
        self.cancel_key = self._login.cancel_key
        if self.console is not None:
            self.phase = Phase.ADMIN
            self.console.start()
            return
        self.traffic = self.relay.traffic_of(self.packet.database)
        self.phase = Phase.REPLICATION if self.packet.is_replication else Phase.OPEN
        self.backend.walker.transaction_status = TRANSACTION_IDLE
        if self.cancel_key is not None and self.phase is Phase.OPEN:
            self.binding = SessionBinding(self.name, self.cancel_key.pid)
            self.preparation.may_bind = True
            if self.relay.settings.hints:
                self.binding.hints = self.relay.make_hints(self.name)
                self.calls = self.relay.calls_of(self.packet)
                self.lookahead = Lookahead(self, self.binding.hints)
        self.relay.on_login(self)
        if rest:
            self.backend.data_received(rest)

    def on_client_login_data(self, data: bytes) -> None:
        for_backend, for_client = self._login.feed_client(data)
        self.backend.write(for_backend)
        self.client.write(for_client)

    def _on_timeout(self) -> None:
        self.end(StartupTimeout("login took too long"))

    # Ordinary traffic

    def is_plain(self, data: bytes) -> bool:
        """Whether nothing in `data`, which starts a message, is for the gateway: then it is forwarded."""
        if self.calls.is_stale or self.preparation.has_changed_views or self.preparation.wants_bind:
            return False
        if data[0] in _TEXT_BEARING and (self.calls.may_call(data) or may_prepare_opening(data)):
            return False
        return self.lookahead is None or not self.lookahead.remembers

    def keeps(self, data: bytes) -> bool:
        """Whether `data`, which starts a message, waits here while the session is bound, or looked ahead in."""
        if self.preparation.starts(data):
            return True
        if self.lookahead is not None and self.lookahead.wants(data):
            if self.is_behind:
                self.hold_until_ready(data)
                return True
            self.phase = Phase.HOLDING
            self.lookahead.hold(data)
            return True
        return False

    def on_client_messages(self, kinds: Sequence[int]) -> None:
        self._num_expected += len(kinds) - kinds.count(_TERMINATE)

    def on_backend_messages(self, kinds: Sequence[int]) -> None:
        binding = self.binding
        if binding is not None and binding.hints is not None and binding.hints.is_used:
            self._end_hints(binding.hints, kinds)
        self.backend.walker.was_idle = False
        for kind in kinds:
            if kind == _READY_FOR_QUERY:
                self._num_expected -= 1
                self.traffic.num_queries += 1
            elif kind == Kind.COPY_IN_RESPONSE and self.client.walker.last_kind == Kind.SYNC and self._num_expected > 0:
                self._num_expected -= 1  # COPY has started: PostgreSQL ignores the Sync that came with it
        if self._num_expected < 0:
            # An order of messages we do not know: never take the session for idle again.
            self._num_expected = 1 << 62
        if self.phase is Phase.WAITING and Kind.COPY_IN_RESPONSE in kinds:
            self._end_waiting()  # the data may be among what is held
        if self._num_expected == 0:
            if self._is_metered:
                self._statement_ends()
            if binding is not None and binding.caller is not None:
                binding.caller.statement_ended()
            if self.phase is Phase.WAITING:
                self._end_waiting()
            if self.relay.draining and self.is_idle:
                self.end(AdminShutdown("terminating connection: the DB node is shutting down"))

    def _end_hints(self, hints: SessionHints, kinds: Sequence[int]) -> None:
        if Kind.ERROR_RESPONSE in kinds:
            hints.note_failure()
        if Kind.READY_FOR_QUERY in kinds:
            hints.end_statement()
            if self.backend.walker.was_idle:
                hints.end_transaction()
                if self.lookahead is not None:
                    self.lookahead.transaction_ended()

    # Statistics

    def statement_begins(self, text: bytes | None) -> None:
        """It may call infer(). Of a pipeline the first counts; its text may come late."""
        self._is_metered = True
        self.relay.book.begin(self.name, _shown(text, self.packet.user) if text is not None else None)

    def _statement_ends(self) -> None:
        self._is_metered = False
        self.relay.book.end(self.name)

    # Statements of the gateway's own

    def hold_for_own(self, data: bytes) -> None:
        """The client's bytes wait until `end_own`."""
        self.own_ended.clear()
        self.phase = Phase.BINDING
        self.held = data
        self.client.stop_reading()

    def end_own(self) -> None:
        self.own_ended.set()
        self.phase = Phase.OPEN
        self._feed_held()
        if not self.backend.is_full:
            self.client.read_on()

    def _feed_held(self) -> None:
        held, self.held = self.held, b""
        if held:
            self.client.data_received(held)

    def run_own(self, exchange: OwnExchange, on_done: Callable[[], None]) -> None:
        """The client's bytes must be held, and `own_ended` be clear."""
        self.exchange, self._on_own_done = exchange, on_done
        self.backend.write(exchange.request)

    def on_own_data(self, data: bytes) -> None:
        """Raises ProtocolViolation."""
        assert self.exchange is not None
        exchange = self.exchange
        self.client.write(exchange.feed(data))
        if exchange.done:
            self.exchange = None
            self._on_own_done()
            if rest := exchange.take_rest():
                self.backend.data_received(rest)

    # Looking ahead

    def start_collecting(self) -> None:
        """The batch that is held is whole, and is not forwarded yet."""
        self.phase = Phase.COLLECTING
        self.own_ended.clear()

    def start_streaming(self) -> None:
        """The statement that is held makes PostgreSQL send its rows by notices, which are not the client's."""
        self.notices = NoticeFilter()

    def go_on(self, held: bytes) -> None:
        """Forward what was held. Raises ProtocolViolation."""
        self.phase = Phase.OPEN
        self.own_ended.set()
        if held:
            self.client.forward(held)
        if not self.backend.is_full:
            self.client.read_on()

    def refuse(self, error: bytes, rest: bytes) -> None:
        """The batch that is held fails, as the transaction has; `rest` follows it. Raises ProtocolViolation."""
        self.backend.walker.transaction_status = TRANSACTION_FAILED
        self.client.write(error + ready_for_query(TRANSACTION_FAILED))
        if self._is_metered:
            self._statement_ends()
        self.go_on(rest)

    @property
    def is_collecting(self) -> bool:
        """Whether the backend runs a pass."""
        return self.phase is Phase.COLLECTING and self.exchange is not None

    @property
    def is_cancelled(self) -> bool:
        """Whether the statement that runs was cancelled while it was held."""
        return self.binding is not None and self.binding.hints is not None and self.binding.hints.is_aborted

    def hold_until_ready(self, rest: bytes) -> None:
        """What the client sends next waits for the end of what was sent; `rest` has come already."""
        self.phase = Phase.WAITING
        self.held = rest

    def hold_more(self, data: bytes) -> None:
        """What the client sends while it waits."""
        self.held += data
        if len(self.held) > HELD_BYTES_MAX:
            self.client.stop_reading()

    def _end_waiting(self) -> None:
        self.phase = Phase.OPEN
        self._feed_held()
        if not self.backend.is_full:
            self.client.read_on()

    def cancel_lookahead(self) -> None:
        """The client has sent a cancel."""
        if self.lookahead is not None:
            self.lookahead.cancel()

    # The end

    def end(self, error: StrataError) -> None:
        """Tell the client why, and close both sides."""
        if self.phase is Phase.CLOSED:
            return
        if self.phase is not Phase.OPEN or self.backend.walker.at_boundary:
            self.client.write(error_response(error, Severity.FATAL))
        if self.is_idle:
            self.backend.write(message(b"X"))
        log.info("session_ended", session=self.name, reason=error.message)
        self._close()

    def on_client_lost(self) -> None:
        """What the client asked for goes on as if it were connected directly, but no inference does."""
        if self.cancel_key is not None and self.exchange is not None:
            self.relay.stop_statement(self.cancel_key)
        elif self.phase in (Phase.OPEN, Phase.WAITING) and not self.is_idle and self.cancel_key is not None:
            self.relay.stop_inference(self.cancel_key)
        self._close()

    def on_backend_lost(self) -> None:
        if self.phase is Phase.CLOSED or (self.console is not None and self.console.is_open):
            return
        if self.exchange is not None and self.exchange.has_ended_session:
            self.client.write(self.exchange.last_error)
        elif self.phase in FOLLOWED and self.backend.walker.last_kind != Kind.ERROR_RESPONSE:
            self._tell_loss()
        self._close()

    def client_left(self) -> None:
        """It has said goodbye to the admin database."""
        self._close()

    def _tell_loss(self) -> None:
        """Only between messages, and only if the client has not said goodbye."""
        if self.backend.walker.at_boundary and self.client.walker.last_kind != Kind.TERMINATE:
            error = BackendLost("PostgreSQL closed the connection unexpectedly")
            self.client.write(error_response(error, Severity.FATAL))

    def _close(self) -> None:
        if self.phase is Phase.CLOSED:
            return
        self.phase = Phase.CLOSED
        self._timer.cancel()
        self.preparation.close()
        self.own_ended.set()
        if self.lookahead is not None:
            self.lookahead.close()
        if self.binding is not None and self.binding.hints is not None:
            if self.backend.walker.transaction_status != TRANSACTION_IDLE:
                self.binding.hints.note_failure()
            self.binding.hints.end_transaction()
        if self._is_metered:
            self._statement_ends()
        if self.binding is not None and self.binding.caller is not None:
            self.binding.caller.close()
        self.client.close()
        self.backend.close()
        self.relay.on_close(self)


def _shown(text: bytes, user: str) -> str | None:
    """Without literals; None if that cannot be."""
    try:
        return normalised(text.decode(), user)
    except UnicodeDecodeError:
        return None
