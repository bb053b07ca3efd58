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
    INFER,
    Batch,
    BatchReader,
    PreparedStatements,
    Readiness,
    bound_statement,
    statement_text,
)
from dbnode.sql.errors import GatewayFailed, ProtocolViolation
from dbnode.sql.hints import PassLimits, StatementHints
from dbnode.sql.messages import TRANSACTION_IDLE, Kind
from dbnode.sql.own_exchange import OwnExchange
from dbnode.sql.own_statements import check_exchange, circumstances, pass_exchange, rollback_exchange
from dbnode.sql.statements import Collectable, collectable
from stratakv.errors import Cancelled
from stratakv.log import EventLogger

if TYPE_CHECKING:
    from dbnode.sql.session import Session

log = EventLogger(__name__)

PASSES_MAX = 16
"""Of one statement."""
ROLLBACKS_MAX = 3
"""Attempts to leave a pass that something interrupts."""
_REFUSED = b"\0C42"
"""In an ErrorResponse: PostgreSQL could not make sense of a statement."""
IDLE_MARGIN_S = 0.2
"""The batch goes on so long before PostgreSQL would end the session as idle."""


class Lookahead:
    """Where the batch of one session is held."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._prepared = PreparedStatements()
        self._reader: BatchReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_described = False
        """The client has flushed a Parse, and nothing else."""
        self._is_open_batch = False

    @property
    def remembers(self) -> bool:
        """Whether what the client sent earlier matters for what it sends next."""
        return self._is_described or bool(self._prepared)

    # Client's bytes

    def wants(self, data: bytes) -> bool:
        """Whether to hold `data`, which starts a message."""
        session, kind = self._session, data[0]
        is_described, self._is_described = self._is_described, False
        if kind == Kind.BIND:
            name = bound_statement(data)
            wanted = name is not None and name in self._prepared
        else:
            wanted = kind in (Kind.QUERY, Kind.PARSE) and INFER.search(data) is not None
            if not wanted and kind in (Kind.QUERY, Kind.PARSE):
                self._prepared.forget(b"")
        if not wanted:
            return False
        session.statement_begins(statement_text(data, self._prepared))
        if session.binding is None or session.binding.caller is None:
            return False
        self._is_open_batch = is_described and session.is_described
        return session.is_idle or self._is_open_batch

    def hold(self, data: bytes) -> None:
        """The beginning of a batch, or more of it."""
        if self._reader is None:
            self._reader = BatchReader(self._prepared)
        readiness = self._reader.feed(data)
        if readiness is Readiness.INCOMPLETE:
            return
        batch = self._reader.batch
        target = _target(batch) if batch is not None else None
        if batch is None or target is None:
            self._is_described = readiness is Readiness.DESCRIBED
            self._go_on()
            return
        self._session.statement_begins(batch.prepared.text)
        self._session.start_collecting()
        self._task = asyncio.get_running_loop().create_task(self._look_ahead(batch, target))

    def add(self, data: bytes) -> None:
        """What the client sends meanwhile."""
        assert self._reader is not None
        self._reader.held += data
        if len(self._reader.held) > HELD_BYTES_MAX:
            self._session.client.stop_reading()

    def _go_on(self) -> None:
        assert self._reader is not None
        held, self._reader = self._reader.held, None
        self._session.go_on(held)

    async def _run(self, exchange: OwnExchange) -> OwnExchange:
        done = asyncio.Event()
        self._session.run_own(exchange, done.set)
        await done.wait()
        return exchange

    # The statement

    def cancel(self) -> None:
        """The client wants the statement to end: it goes on at once, and fails by its next call."""
        hints = self._hints
        if self._task is not None and hints is not None:
            hints.abort(Cancelled("canceling statement due to user request"))

    def close(self) -> None:
        """The session has ended."""
        if self._task is not None:
            self._task.cancel()
        if self._hints is not None:
            self._hints.close()

    @property
    def _hints(self) -> StatementHints | None:
        return self._session.binding.hints if self._session.binding is not None else None

    async def _look_ahead(self, batch: Batch, target: Collectable) -> None:
        session = self._session
        assert session.binding is not None
        hints = session.binding.hints = session.relay.make_hints(session.name)
        try:
            await self._collect(batch, target, hints)
            self._task = None
            self._go_on()
        except (ProtocolViolation, GatewayFailed) as error:
            session.end(error)
        except Exception:
            log.exception("looking_ahead_failed", session=session.name)
            session.end(GatewayFailed("internal error"))

    async def _collect(self, batch: Batch, target: Collectable, hints: StatementHints) -> None:
        loop, settings = asyncio.get_running_loop(), self._session.relay.settings
        started_s = loop.time()
        found = circumstances(await self._run(check_exchange(target.functions, sync_first=self._is_open_batch)))
        if not found.may_collect:
            return
        window = settings.hints_window if target.is_bounded or batch.is_partial else None
        budget_s = min(settings.hints_budget_s, found.statement_timeout_s or settings.hints_budget_s)
        for number in range(1, PASSES_MAX + 1):
            if hints.failure is not None:
                return
            pass_started_s = loop.time()
            limits = PassLimits(window, settings.hints_bytes_max, pass_started_s + budget_s)
            await self._run_pass(batch, target, hints, limits, budget_s)
            pass_ended_s = loop.time()
            budget_s -= pass_ended_s - pass_started_s
            num_new = await hints.end_pass(found.order_budget_s(settings.order_budget_s))
            idle_s = found.idle_timeout_s and found.idle_timeout_s - (loop.time() - pass_ended_s)
            log.debug("pass_ended", session=self._session.name, number=number, new=num_new, window=window)
            if num_new == 0 or not await self._settle(hints, started_s, found.statement_timeout_s, idle_s):
                return
            if budget_s <= 0:
                return
            window = window and 2 * window

    async def _run_pass(
        self, batch: Batch, target: Collectable, hints: StatementHints, limits: PassLimits, budget_s: float
    ) -> None:
        """Let the hints see what the statement asks."""
        sites = None if hints.is_unnumbered else target.sites
        hints.start_pass(limits, sites.governors if sites is not None else None)
        select = sites.select if sites is not None else target.select
        exchange = await self._run(pass_exchange(batch, select, budget_s))
        if sites is not None and _REFUSED in exchange.last_error:
            # A function of these names that is not ours, or an expression that no longer equals another one.
            hints.is_unnumbered = True
            exchange = await self._run(pass_exchange(batch, target.select, budget_s))
        for _ in range(ROLLBACKS_MAX):
            if exchange.transaction_status == TRANSACTION_IDLE:
                return
            exchange = await self._run(rollback_exchange())
        raise GatewayFailed("the DB node could not end its transaction")

    async def _settle(
        self, hints: StatementHints, started_s: float, statement_s: float | None, idle_s: float | None
    ) -> bool:
        """Wait for the model; False if the statement must not wait any longer. No transaction is open meanwhile."""
        loop = asyncio.get_running_loop()
        left_s = None if statement_s is None else started_s + statement_s - loop.time()
        idle_left_s = None if idle_s is None else max(0.0, idle_s - IDLE_MARGIN_S)
        timeouts = [value for value in (left_s, idle_left_s) if value is not None]
        if await hints.settle(max(0.0, min(timeouts)) if timeouts else None):
            return True
        if statement_s is not None and loop.time() >= started_s + statement_s:
            hints.abort(Cancelled("canceling statement due to statement timeout"))
        return False


def _target(batch: Batch) -> Collectable | None:
    with contextlib.suppress(UnicodeDecodeError):
        return collectable(batch.prepared.text.decode())
    return None
