"""What must happen on a session's backend before a statement of the client's: learn which views call infer(), bind the session,
run what the client's batch begins with. Made by `Session`; it keeps what is still to be done.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from dbnode.sql.hidden_calls import REFRESH_S, changes_views
from dbnode.sql.messages import Kind, ready_for_query
from dbnode.sql.own_exchange import OwnExchange, text_columns
from dbnode.sql.own_statements import bind_exchange, learn_exchange
from stratakv.log import EventLogger

if TYPE_CHECKING:
    from dbnode.sql.session import Session

log = EventLogger(__name__)

_TEXTS = frozenset({int(Kind.QUERY), int(Kind.PARSE)})
_STARTING = _TEXTS | {int(Kind.CLOSE), int(Kind.BIND)}
"""First messages of a batch that may have a call in it."""


class Preparation:
    """Of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.has_changed_views = False
        """A statement of this session has, since it was learned which of them call infer()."""
        self.may_bind = False
        """No attempt has been made yet."""
        self.wants_bind = False
        """A statement that may call infer() has come, and no attempt has been made yet."""
        self._nonce = ""

    def starts(self, data: bytes) -> bool:
        """Whether `data`, which starts a message, waits because something is done first."""
        session = self._session
        if (session.calls.is_stale or self.has_changed_views) and self._must_learn(data):
            self._learn(data)
            return True
        if self.may_bind and self._must_bind(data):
            self._bind(data)
            return True
        return False

    def close(self) -> None:
        """The session has ended."""
        self._session.relay.registry.revoke(self._nonce)

    # Learning

    def _must_learn(self, data: bytes) -> bool:
        return self._session.lookahead is not None and data[0] in _TEXTS and self._session.is_idle

    def _learn(self, data: bytes) -> None:
        self._session.calls.is_stale = self.has_changed_views = False
        self._session.hold_for_own(data)
        exchange = learn_exchange()
        self._session.run_own(exchange, lambda: self._end_learning(exchange))

    def _end_learning(self, exchange: OwnExchange) -> None:
        row = text_columns(exchange.row) if exchange.row is not None else []
        self._session.calls.learn(row, asyncio.get_running_loop().time())
        self._session.end_own()

    def note_calls(self, data: bytes) -> None:
        """A statement that may call infer() begins."""
        calls = self._session.calls
        self.has_changed_views |= changes_views(data)
        if asyncio.get_running_loop().time() - calls.learned_s > REFRESH_S:
            calls.is_stale = True

    # Binding

    def _must_bind(self, data: bytes) -> bool:
        """Within a transaction only before the statement itself: binding takes a snapshot, as it is going to."""
        session = self._session
        is_for_infer = data[0] in _STARTING and session.calls.may_call(data)
        self.wants_bind = self.wants_bind or is_for_infer
        return self.wants_bind and (session.is_between if is_for_infer else session.is_idle)

    def _bind(self, data: bytes) -> None:
        session = self._session
        assert session.binding is not None
        self.may_bind = self.wants_bind = False
        session.hold_for_own(data)
        self._nonce = session.relay.registry.issue(session.binding)
        session.run_own(bind_exchange(session.within, self._nonce, session.relay.listener_name), self._end_bind)

    def _end_bind(self) -> None:
        self._session.relay.registry.revoke(self._nonce)
        log.debug("session_bound", session=self._session.name, failed=not self._session.is_bound)
        self._session.end_own()

    # What a batch begins with

    def run_first(self, first: bytes, held: bytes, rest: bytes) -> None:
        """Run `first` by itself, a BEGIN; `held` is what is left of its batch, and `rest` follows the batch."""
        self._session.hold_for_own(held + rest)
        exchange = OwnExchange.of_client(first)
        self._session.run_own(exchange, lambda: self._end_first(exchange, rest))

    def _end_first(self, exchange: OwnExchange, rest: bytes) -> None:
        session = self._session
        session.backend.walker.transaction_status = exchange.transaction_status
        if exchange.first_error:  # the batch fails
            session.client.write(ready_for_query(exchange.transaction_status))
            session.held = rest
        session.end_own()
