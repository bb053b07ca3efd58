"""Usage events: one row per request in PostgreSQL, written in batches in the background.

An Observer of the inference service. The database may be away: events wait in a bounded queue, then the oldest are dropped
and counted; serving goes on. A batch may be written again: a request id is taken once. What is written late is booked to the
time when the request ended.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from dbnode.generate import Outcome, Settled, Source
from dbnode.own_connection import AWAY, OwnConnection
from stratakv.log import EventLogger
from stratakv.queries import load_queries
from stratakv.settings import DatabaseSettings

log = EventLogger("dbnode.usage")

EVENTS_WAITING_MAX = 10_000
BATCH_EVENTS_MAX = 500
FLUSH_S = 0.5
RETRY_S_MAX = 10.0
WRITE_TIMEOUT_S = 10.0
WARN_EVERY_S = 30.0

_insert = load_queries("dbnode")["insert_usage_events"]


@dataclass(frozen=True, slots=True)
class _Ended:
    """A request and when it ended, on the monotonic clock."""

    settled: Settled
    at_s: float


class UsageWriter:
    """Writes usage events while `run` runs."""

    def __init__(
        self, settings: DatabaseSettings, on_dropped: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._on_dropped = on_dropped
        self._events: deque[_Ended] = deque()
        self._batch: list[_Ended] = []
        """Taken from the queue, and being written until the database has it."""
        self._some = asyncio.Event()
        self._connection = OwnConnection(settings, WRITE_TIMEOUT_S)
        self._warned_s = 0.0

    def first_token(self, source: Source, ttft_s: float) -> None:
        """Nothing is written before the end."""

    def settled(self, settled: Settled) -> None:
        if self._settings.url is None:
            return
        charge, ended_s = settled.request.charge, self._clock()
        if charge is None:
            self._take(_Ended(settled, ended_s))
        else:
            unused = replace(settled, outcome=Outcome.UNUSED)
            charge.settle(lambda is_due: self._take(_Ended(settled if is_due else unused, ended_s)))

    def _take(self, ended: _Ended) -> None:
        if len(self._events) >= EVENTS_WAITING_MAX:
            self._events.popleft()
            self._on_dropped()
        self._events.append(ended)
        self._some.set()

    async def run(self) -> None:
        """Write until cancelled."""
        retry_s = FLUSH_S
        while True:
            await self._some.wait()
            await asyncio.sleep(retry_s)
            retry_s = FLUSH_S if await self._flush() else min(RETRY_S_MAX, retry_s * 2)

    async def close(self) -> None:
        """Write what is left, if the database is there."""
        if not await self._flush():
            log.warning("usage_events_lost", events=len(self._events) + len(self._batch))
        self._connection.drop()

    async def _flush(self) -> bool:
        """Write all that waits; False if the database is away."""
        while self._events or self._batch:
            if not self._batch:
                self._batch = [self._events.popleft() for _ in range(min(len(self._events), BATCH_EVENTS_MAX))]
            try:
                connection, now_s = await self._connection.get(), self._clock()
                rows = [(*_row(ended.settled), now_s - ended.at_s) for ended in self._batch]
                await connection.execute(_insert, *zip(*rows, strict=True))
            except AWAY as error:
                self._lost(error)
                return False
            self._batch = []
        self._some.clear()
        return True

    def _lost(self, error: BaseException) -> None:
        if time.monotonic() - self._warned_s > WARN_EVERY_S:
            self._warned_s = time.monotonic()
            log.warning("usage_not_written", waiting=len(self._events) + len(self._batch), error=type(error).__name__)
        self._connection.drop()


def _row(settled: Settled) -> tuple[object, ...]:
    """Columns in the order of the query's parameters, but the last: how long ago the request ended."""
    request, usage = settled.request, settled.usage
    generation_ms = usage.timings.e2e_ms - usage.timings.ttft_ms if usage.timings.ttft_ms else None
    num_gaps = usage.completion_tokens - 1
    return (
        request.request_id,
        request.caller.tenant.name,
        settled.model,
        request.source.value,
        usage.prompt_tokens,
        usage.tiers.l1,
        usage.tiers.l2,
        usage.tiers.pool,
        usage.tiers.disk,
        usage.completion_tokens,
        settled.outcome.value if settled.outcome is Outcome.UNUSED else settled.error_code or settled.outcome.value,
        usage.timings.queue_ms,
        usage.timings.ttft_ms or None,
        generation_ms,
        generation_ms / num_gaps if generation_ms is not None and num_gaps > 0 else None,
    )
