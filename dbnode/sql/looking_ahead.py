"""Holds a client's batch, learns what its statement will ask the model, has that answered, and lets the batch go on.

One for each session that is bound. PostgreSQL executes the client's statement exactly once, from its own bytes; whatever goes
wrong here only costs time.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from dbnode.sql.client_batch import (
    HELD_BYTES_MAX,
    Batch,
    BatchReader,
    Prepared,
    PreparedStatements,
    Readiness,
    Resumed,
    bound_statement,
    opening,
    statement_text,
)
from dbnode.sql.cursors import FETCHING, OpenCursor, OpenCursors, declared, fetched
from dbnode.sql.errors import GatewayFailed, ProtocolViolation
from dbnode.sql.explained import explained
from dbnode.sql.messages import HEADER_BYTES, Kind
from dbnode.sql.own_statements import Within
from dbnode.sql.passes import Aim, Passes, TransactionLost
from dbnode.sql.session_hints import SessionHints
from dbnode.sql.statements import Collectable, collectable
from stratakv.errors import Cancelled
from stratakv.log import EventLogger

if TYPE_CHECKING:
    from dbnode.sql.session import Session

log = EventLogger(__name__)


class Lookahead:
    """Where the batch of one session is held."""

    def __init__(self, session: Session, hints: SessionHints) -> None:
        self._session = session
        self._hints = hints
        self._prepared = PreparedStatements(session.calls.may_call)
        self._cursors = OpenCursors()
        self._reader: BatchReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_described = False
        """The client has flushed a Parse, and nothing else."""
        self._is_open_batch = False

    @property
    def remembers(self) -> bool:
        """Whether what the client sent earlier matters for what it sends next."""
        return self._is_described or bool(self._prepared) or bool(self._cursors)

    # Client's bytes

    def wants(self, data: bytes) -> bool:
        """Whether to hold `data`, which starts a message."""
        session, kind = self._session, data[0]
        is_described, self._is_described = self._is_described, False
        if kind in (Kind.QUERY, Kind.PARSE, Kind.BIND) and (begin := opening(data, self._prepared)) is not None:
            return self._wants_after(begin, data)
        if kind == Kind.BIND:
            name = bound_statement(data)
            wanted = name is not None and name in self._prepared
        else:
            wanted = kind in (Kind.QUERY, Kind.PARSE, Kind.CLOSE) and session.calls.may_call(data)
            if not wanted and kind in (Kind.QUERY, Kind.PARSE):
                self._prepared.forget(b"")
            if self._cursors:
                is_fetch = kind in (Kind.QUERY, Kind.PARSE) and FETCHING.search(data) is not None
                wanted = wanted or is_fetch or kind == Kind.EXECUTE
        if not wanted:
            return False
        if session.is_behind:
            return session.is_bound
        session.preparation.note_calls(data)
        session.statement_begins(None if kind in (Kind.EXECUTE, Kind.CLOSE) else statement_text(data, self._prepared))
        if not session.is_bound:
            return False
        self._is_open_batch = is_described and session.is_described
        return session.is_between or self._is_open_batch

    def _wants_after(self, begin: Prepared, data: bytes) -> bool:
        """Whether to hold a BEGIN for the sake of what has come with it."""
        if data[0] == Kind.PARSE:
            self._prepared.put(data[HEADER_BYTES:].partition(b"\0")[0], begin)
        session = self._session
        return session.is_bound and session.is_between and self._prepared.may_be_called(data)

    def hold(self, data: bytes) -> None:
        """The beginning of a batch, or more of it."""
        if self._reader is None:
            self._reader = BatchReader(self._prepared)
        readiness = self._reader.feed(data)
        if readiness is Readiness.INCOMPLETE:
            return
        if self._reader.opening_bytes and readiness is Readiness.COMPLETE:
            self._open_first()
            return
        batch = self._reader.batch
        if isinstance(batch, Batch) and _is_planned_only(batch):
            self._hints.statement.is_planning = True
            self._go_on(is_alone=True)
            return
        aim = self._aim(batch) if batch is not None else None
        if aim is None:
            self._is_described = readiness is Readiness.DESCRIBED
            self._go_on()
            return
        self._session.statement_begins(aim.batch.prepared.text)
        self._session.start_collecting()
        self._task = asyncio.get_running_loop().create_task(self._look_ahead(aim))

    def _aim(self, batch: Batch | Resumed) -> Aim | None:
        """What to look ahead for before a batch."""
        if isinstance(batch, Resumed):
            return self._aim_further(batch.portal.decode(errors="replace"), batch.num_rows or None)
        try:
            text = batch.prepared.text.decode()
        except UnicodeDecodeError:
            return None
        if self._cursors and (fetch := fetched(text)) is not None:
            return self._aim_further(fetch.name, fetch.num_rows)
        declare = declared(text)
        session = self._session
        query = text if declare is None else declare.query
        target = collectable(query, session.calls.views, session.packet.user)
        if target is None:
            return None
        window = max(self._session.relay.settings.hints_window, batch.num_rows)
        if declare is not None and not declare.is_held:
            if self._session.within is Within.NOTHING:
                return None  # PostgreSQL refuses it
            return Aim(batch, target, self._open(declare.name, batch, target, window))
        if batch.num_rows:
            return Aim(batch, target, self._open(batch.portal.decode(errors="replace"), batch, target, window))
        return Aim(batch, target)

    def _open_first(self) -> None:
        """The batch begins a transaction block and then calls infer(): that is a statement of its own."""
        assert self._reader is not None
        reader, self._reader = self._reader, None
        if self._session.within is Within.TRANSACTION:
            self._session.go_on(reader.held)  # PostgreSQL only warns of another BEGIN
        else:
            size_bytes = reader.opening_bytes
            self._session.preparation.run_first(reader.whole[:size_bytes], reader.whole[size_bytes:], reader.rest)

    def _open(self, name: str, batch: Batch, target: Collectable, window: int) -> OpenCursor:
        cursor = OpenCursor(batch, target, window)
        if self._session.within is Within.TRANSACTION:
            self._cursors.put(name, cursor)
        return cursor

    def _aim_further(self, name: str, num_rows: int | None) -> Aim | None:
        """Before a part of the rows of a cursor is fetched; None for all that are left."""
        cursor = self._cursors.get(name)
        if cursor is None or not cursor.needs_more(num_rows):
            return None
        if num_rows is None:
            return Aim(cursor.batch, cursor.target)
        cursor.window = max(cursor.window, num_rows)
        return Aim(cursor.batch, cursor.target, cursor)

    def transaction_ended(self) -> None:
        """No cursor is left."""
        if self._cursors:
            self._cursors.clear()

    def add(self, data: bytes) -> None:
        """What the client sends meanwhile."""
        assert self._reader is not None
        self._reader.held += data
        if len(self._reader.held) > HELD_BYTES_MAX:
            self._session.client.stop_reading()

    def _go_on(self, *, is_alone: bool = False) -> None:
        """Let go of what is held. What follows the batch waits for the end of it, if it shall be alone, or calls infer() too."""
        assert self._reader is not None
        reader, self._reader = self._reader, None
        if is_alone or (reader.is_complete and self._prepared.may_be_called(reader.rest)):
            self._session.go_on(reader.whole)
            self._session.hold_until_ready(reader.rest)
        else:
            self._session.go_on(reader.held)

    def _refuse(self, error: bytes) -> None:
        assert self._reader is not None
        rest, self._reader = self._reader.rest, None
        self._hints.note_failure()
        self._hints.end_statement()
        self._session.refuse(error, rest)

    # The statement

    def cancel(self) -> None:
        """The client wants the statement to end: it goes on at once, and fails by its next call."""
        if self._task is not None:
            self._hints.abort(Cancelled("canceling statement due to user request"))

    def close(self) -> None:
        """The session has ended."""
        if self._task is not None:
            self._task.cancel()

    async def _look_ahead(self, aim: Aim) -> None:
        session = self._session
        try:
            await Passes(session, aim, self._hints.statement, sync_first=self._is_open_batch).run()
            self._task = None
            self._go_on()
        except TransactionLost as error:
            self._task = None
            self._refuse(error.response)
        except (ProtocolViolation, GatewayFailed) as error:
            session.end(error)
        except Exception:
            log.exception("looking_ahead_failed", session=session.name)
            session.end(GatewayFailed("internal error"))


def _is_planned_only(batch: Batch) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        found = explained(batch.prepared.text.decode())
        return found is not None and not found.is_run
    return False
