"""What the statements of the SQL face ask of the model and get: counted while they run, and handed on when they end.

Fed by sessions (a statement begins, ends), by the private listener (calls) and by `MeteredService` (inferences). A statement is
known by its text without literals; calls that reach the listener from elsewhere have none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

from dbnode.sql.service import CallCost, InferCall, InferenceService, Login
from stratakv.errors import StrataError


@dataclass(frozen=True, slots=True)
class StatementKey:
    """Whose statement, where, and which."""

    role: str
    database: str
    login: Login | None
    """With the cluster, and the OID of the role; None if the functions do not tell it."""
    query: str | None
    """Without literals; None if it is not known."""


@dataclass(slots=True)
class StatementCounts:
    """Sums over executions of a statement."""

    calls: int = 0
    """Executions."""
    infer_calls: int = 0
    distinct_prompts: int = 0
    """Inferences that the model was asked for."""
    memo_hits: int = 0
    """Calls that found their answer waiting, or under way."""
    prompt_tokens: int = 0
    cached_l1_tokens: int = 0
    cached_l2_tokens: int = 0
    cached_pool_tokens: int = 0
    generated_tokens: int = 0
    wait_ms: float = 0.0
    """PostgreSQL or the gateway waited for the model."""
    errors: int = 0
    """Inferences that failed."""

    @property
    def cached_tokens(self) -> int:
        return self.cached_l1_tokens + self.cached_l2_tokens + self.cached_pool_tokens

    def add(self, other: StatementCounts) -> None:
        for name in StatementCounts.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def add_cost(self, cost: CallCost) -> None:
        self.prompt_tokens += cost.prompt_tokens
        self.cached_l1_tokens += cost.l1_tokens
        self.cached_l2_tokens += cost.l2_tokens
        self.cached_pool_tokens += cost.pool_tokens
        self.generated_tokens += cost.generated_tokens


class StatementLog(Protocol):
    """Where counts go when a statement has ended. Implemented by `dbnode.statement_stats`."""

    def add(self, key: StatementKey, counts: StatementCounts) -> None: ...


@dataclass(slots=True)
class StatementMeter:
    """One execution of a statement."""

    session: str
    query: str | None
    started_s: float
    """On the event loop's clock."""
    started_at_s: float = field(default_factory=time.time)
    role: str | None = None
    """Whose it is, once it has called infer()."""
    database: str = ""
    login: Login | None = None
    num_done: int = 0
    """Of the distinct prompts."""
    num_waiting: int = 0
    """Who waits for the model now: a call, or the gateway."""
    counts: StatementCounts = field(default_factory=lambda: StatementCounts(calls=1))
    has_ended: bool = False

    def count_call(self, *, is_known: bool) -> None:
        """A call of the statement itself; its answer is there or under way, or has to be asked for."""
        self.counts.infer_calls += 1
        if is_known:
            self.counts.memo_hits += 1
        else:
            self.counts.distinct_prompts += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Somebody waits for the model."""
        loop = asyncio.get_running_loop()
        since_s = loop.time()
        self.num_waiting += 1
        try:
            yield
        finally:
            self.num_waiting -= 1
            self.counts.wait_ms += (loop.time() - since_s) * 1e3


class StatementBook:
    """Meters of the statements that run, and sums of all."""

    def __init__(self, sink: StatementLog | None = None) -> None:
        self.by_database: dict[str, StatementCounts] = {}
        """Sums; PostgreSQL knows the databases, so they are not endlessly many."""
        self._sink = sink
        self._running: dict[str, StatementMeter] = {}

    @property
    def running(self) -> list[StatementMeter]:
        """Those that have called infer()."""
        return [meter for meter in self._running.values() if meter.role is not None]

    def sums(self) -> StatementCounts:
        """Of all databases; of statements that have ended."""
        total = StatementCounts()
        for counts in self.by_database.values():
            total.add(counts)
        return total

    def of(self, session: str) -> StatementMeter | None:
        """Of the statement that a session has under way, if it may call infer()."""
        return self._running.get(session)

    # What sessions tell

    def begin(self, session: str, query: str | None) -> None:
        """A statement that may call infer() goes to PostgreSQL; one at a time, the first of a pipeline."""
        meter = self._running.get(session)
        if meter is None:
            self._running[session] = StatementMeter(session, query, asyncio.get_running_loop().time())
        elif meter.query is None:
            meter.query = query

    def end(self, session: str) -> None:
        """It has ended, or the session has."""
        meter = self._running.pop(session, None)
        if meter is not None:
            self._finish(meter)

    # What the listener tells

    def called(self, session: str, role: str, database: str, login: Login | None) -> StatementMeter:
        """A call of infer(), of a pass too. The meter of a session that has told no statement is the call's own."""
        meter = self._running.get(session)
        if meter is None:
            meter = StatementMeter(session, None, asyncio.get_running_loop().time())
            meter.counts.calls = 0
        if meter.role is None:
            meter.role, meter.database, meter.login = role, database, login
        return meter

    def finish_own(self, meter: StatementMeter) -> None:
        """The call has ended; if the meter is its own, so does that."""
        if self._running.get(meter.session) is not meter and not meter.has_ended:
            self._finish(meter)

    def found(self, session: str, num_prompts: int) -> None:
        """A pass has found so many prompts, which are sent now."""
        if (meter := self._running.get(session)) is not None:
            meter.counts.distinct_prompts += num_prompts

    def waiting(self, session: str) -> AbstractContextManager[None]:
        """The gateway waits for the model before the statement goes on."""
        meter = self._running.get(session)
        return meter.waiting() if meter is not None else nullcontext()

    def cost(self, meter: StatementMeter, cost: CallCost) -> None:
        """What an inference took; it may end after its statement."""
        if not meter.has_ended:
            meter.counts.add_cost(cost)
            return
        late = StatementCounts()
        late.add_cost(cost)
        self._hand_on(meter, late)

    def _finish(self, meter: StatementMeter) -> None:
        meter.has_ended = True
        self._hand_on(meter, replace(meter.counts))

    def _hand_on(self, meter: StatementMeter, counts: StatementCounts) -> None:
        if meter.role is None:
            return  # it has the word infer in it, and no call
        self.by_database.setdefault(meter.database, StatementCounts()).add(counts)
        if self._sink is not None:
            self._sink.add(StatementKey(meter.role, meter.database, meter.login, meter.query), counts)


class MeteredService:
    """The inference service, with what each call costs told to the meter of its statement."""

    def __init__(self, service: InferenceService, book: StatementBook) -> None:
        self._service = service
        self._book = book

    async def infer_text(self, call: InferCall) -> str:
        """Raises what the service raises."""
        meter = self._book.called(call.session, call.role, call.database, call.login)
        try:
            return await self._service.infer_text(replace(call, on_cost=self._reporter(meter)))
        except StrataError:
            meter.counts.errors += 1
            raise
        finally:
            meter.num_done += 1
            self._book.finish_own(meter)

    async def reserve(self, calls: Sequence[InferCall]) -> list[InferCall]:
        """Raises what the service raises."""
        return await self._service.reserve(calls)

    def _reporter(self, meter: StatementMeter) -> Callable[[CallCost], None]:
        return lambda cost: self._book.cost(meter, cost)
