"""The passes before one statement: its SELECT is run read-only on the session's backend, so that its hints see what it asks.

Made by `dbnode.sql.looking_ahead`, which holds the client's bytes meanwhile. The session is afterwards where it was before.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbnode.sql.client_batch import Batch
from dbnode.sql.cursors import OpenCursor
from dbnode.sql.errors import GatewayFailed
from dbnode.sql.hints import PassLimits, StatementHints
from dbnode.sql.messages import TRANSACTION_FAILED
from dbnode.sql.own_exchange import OwnExchange
from dbnode.sql.own_statements import (
    Circumstances,
    Within,
    check_exchange,
    circumstances,
    end_exchange,
    pass_exchange,
)
from dbnode.sql.statements import Collectable
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
_CANCELLED = b"\0C57014\0"
"""PostgreSQL has cancelled a statement, or its time is over."""
TIMER_MARGIN_S = 0.002
"""PostgreSQL's timer is not earlier than so much before its time."""
IDLE_MARGIN_S = 0.2
"""The batch goes on so long before PostgreSQL would end the session as idle."""


class TransactionLost(Exception):
    """Something ended the client's transaction while a statement of the gateway's ran: a cancel that nobody sent us."""

    def __init__(self, response: bytes) -> None:
        super().__init__("the transaction has failed")
        self.response = response
        """PostgreSQL's ErrorResponse."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What is looked ahead for."""

    batch: Batch
    """Where its parameters are."""
    target: Collectable
    cursor: OpenCursor | None = None
    """Only the next rows of it are wanted."""


class Passes:
    """Of one statement; `run` is called once."""

    def __init__(self, session: Session, aim: Aim, hints: StatementHints, *, sync_first: bool) -> None:
        self._session = session
        self._aim = aim
        self._hints = hints
        self._within = session.within
        self._sync_first = sync_first
        """The client's batch is open: it has flushed, and not synced."""

    async def run(self) -> None:
        """As many as it takes. Raises TransactionLost, GatewayFailed."""
        settings, aim, hints = self._session.relay.settings, self._aim, self._hints
        started_s = asyncio.get_running_loop().time()
        check = await self._run(check_exchange(self._within, aim.target.functions, sync_first=self._sync_first))
        await self._leave(check)
        found = circumstances(check, self._within, started_s)
        if not found.may_collect:
            return
        if aim.cursor is None:
            window = settings.hints_window if aim.target.is_bounded else None
            # Where calls depend on others, or the window grows, later passes need the answers.
            hints.is_streaming = found.may_stream and window is None and aim.target.sites is None
            await self._run_passes(window, found)
            return
        hints.is_lasting = True
        num_new = await self._run_passes(aim.cursor.window, found)
        aim.cursor.looked(hints.found, is_exhausted=num_new == 0)

    async def _run_passes(self, window: int | None, found: Circumstances) -> int:
        """How many new prompts the last one found. Raises TransactionLost, GatewayFailed."""
        loop, settings = asyncio.get_running_loop(), self._session.relay.settings
        aim, hints = self._aim, self._hints
        passes_max = PASSES_MAX if aim.cursor is None else min(PASSES_MAX, aim.cursor.num_levels)
        budget_s = min(settings.hints_budget_s, found.statement_s or settings.hints_budget_s)
        num_new = 0
        for number in range(1, passes_max + 1):
            if hints.failure is not None:
                break
            pass_started_s = loop.time()
            limits = PassLimits(window, settings.hints_bytes_max, pass_started_s + budget_s)
            is_whole = await self._run_pass(limits, budget_s)
            pass_ended_s = loop.time()
            budget_s -= pass_ended_s - pass_started_s
            num_new = await hints.end_pass(found.order_budget_s(settings.order_budget_s))
            log.debug("pass_ended", session=self._session.name, number=number, new=num_new, window=window)
            if hints.is_streaming:
                self._session.start_streaming()
                break
            if num_new == 0 or number == passes_max or budget_s <= 0:
                break
            if not await self._settle(pass_ended_s, found) or (is_whole and aim.target.is_one_level):
                break
            window = window and 2 * window
        return num_new

    async def _run_pass(self, limits: PassLimits, budget_s: float) -> bool:
        """Let the hints see what the statement asks; whether it ran to its end."""
        target, hints = self._aim.target, self._hints
        sites = None if hints.is_unnumbered else target.sites
        hints.start_pass(limits, sites.governors if sites is not None else None)
        if sites is not None:
            exchange = await self._run_select(sites.select, budget_s)
            if _REFUSED not in exchange.first_error:
                return not exchange.first_error
            # A function of these names that is not ours, or an expression that no longer equals another one.
            hints.is_unnumbered = True
        exchange = await self._run_select(target.select, budget_s)
        return not exchange.first_error

    async def _run_select(self, select: str, budget_s: float) -> OwnExchange:
        """Raises TransactionLost, GatewayFailed."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        exchange = await self._run(pass_exchange(self._within, self._aim.batch, select, budget_s))
        is_in_time = loop.time() - started_s < budget_s - TIMER_MARGIN_S
        await self._leave(exchange)
        if _CANCELLED in exchange.first_error and is_in_time and not self._session.is_cancelled:
            # Somebody's pg_cancel_backend: it is the client's statement that is meant.
            self._hints.abort(Cancelled("canceling statement due to user request"))
            self._session.relay.repeat_cancel(self._session)
        return exchange

    async def _leave(self, exchange: OwnExchange) -> None:
        """Make sure that the session is again where it was before an exchange that is done."""
        within, error = self._within, exchange.first_error
        for _ in range(ROLLBACKS_MAX):
            if exchange.transaction_status == within.value:
                return
            exchange = await self._run(end_exchange(within))
        if within is Within.TRANSACTION and exchange.transaction_status == TRANSACTION_FAILED:
            raise TransactionLost(error)
        raise GatewayFailed("the DB node could not end its transaction")

    async def _settle(self, idle_since_s: float, found: Circumstances) -> bool:
        """Wait for the model; False if the statement must not wait any longer. No statement runs meanwhile.

        Within the client's transaction the time is short in which it may be idle. When that is over the statement goes on,
        and its calls wait.
        """
        loop = asyncio.get_running_loop()
        waits = [] if found.statement_s is None else [found.checked_s + found.statement_s - loop.time()]
        if found.idle_s is not None:
            waits.append(idle_since_s + found.idle_s - IDLE_MARGIN_S - loop.time())
        if found.transaction_left_s is not None:
            waits.append(found.checked_s + found.transaction_left_s - IDLE_MARGIN_S - loop.time())
        if await self._hints.settle(max(0.0, min(waits)) if waits else None):
            return True
        if found.statement_s is not None and loop.time() >= found.checked_s + found.statement_s:
            self._hints.abort(Cancelled("canceling statement due to statement timeout"))
        return False

    async def _run(self, exchange: OwnExchange) -> OwnExchange:
        done = asyncio.Event()
        self._session.run_own(exchange, done.set)
        await done.wait()
        return exchange
