"""Writes changes to PostgreSQL in order, many together: while one batch is on its way, the next one gathers.

A change stays until it is written, across reconnects; only ends of puts are given back to their writers when a batch fails
(the outcome is then open, and is asked for again by put_id). Bounded by `JOURNAL_OPS_MAX`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from meta_server.records import CommittedRun, Removal, StartedPut, Statement, WriteBatch
from meta_server.store import STATEMENT_TIMEOUT_S, Store
from stratakv.errors import Overloaded, Unavailable
from stratakv.wire import CacheRule, Segment, WorkerInfo

JOURNAL_OPS_MAX = 100_000
RETRY_S_MIN = 0.05
RETRY_S_MAX = 2.0

Decided = asyncio.Future[str]
"""The state of a put after the batch: committed, void or (never written) absent."""
ABSENT = "absent"


class Journal:
    """The one writer of this process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next = WriteBatch()
        self._deciding: dict[bytes, Decided] = {}
        self._ending: set[bytes] = set()
        self._callbacks: list[Callable[[], None]] = []
        self._wake = asyncio.Event()
        self.available = True
        """False from a failed write to the next one that succeeds."""

    def check_room(self) -> None:
        """Raises Unavailable or Overloaded if a change that can wait should not be begun now."""
        if not self.available:
            raise Unavailable("the metadata database does not answer; try again")
        if len(self._next) >= JOURNAL_OPS_MAX:
            raise Overloaded("too many changes wait to be written")

    def register_segment(self, segment: Segment) -> asyncio.Future[None]:
        if segment not in self._next.segments:
            self._next.segments.append(segment)
        return self.all_written()

    def register_worker(self, info: WorkerInfo) -> None:
        if info not in self._next.workers:
            self._next.workers.append(info)
        self._wake.set()

    def start_put(self, put: StartedPut) -> None:
        self._next.starts.append(put)
        self._wake.set()

    def end_put(self, put_id: bytes, extents: bytes) -> Decided:
        """Fails with Unavailable if the batch does; the outcome is then open."""
        self._next.ends.append((put_id, extents))
        self._ending.add(put_id)
        return self._decision(put_id)

    def void_put(self, put_id: bytes) -> Decided:
        """Written sooner or later."""
        self._next.voids.append(put_id)
        return self._decision(put_id)

    def add_pages(self, put_id: bytes, run: CommittedRun) -> None:
        """Pages that a daemon has copied to another of its segments."""
        self._next.pages.append((put_id, run))
        self._wake.set()

    def remove(self, removal: Removal, written: Callable[[], None]) -> None:
        """`written` is called once a restart can no longer bring the pages back."""
        self._next.removals.append(removal)
        self.when_written(written)

    def set_rule(self, rule: CacheRule) -> None:
        self._next.rules.append(rule)
        self._wake.set()

    def execute(self, sql: str, *arguments: object) -> None:
        """A statement of another table's owner, after those before it and safe to repeat."""
        self._next.statements.append(Statement(sql, arguments))
        self._wake.set()

    def finish_removal(self, removal_id: int) -> None:
        self._next.freed.append(removal_id)
        self._wake.set()

    def when_written(self, callback: Callable[[], None]) -> None:
        """Call back after everything handed in so far is written."""
        self._callbacks.append(callback)
        self._wake.set()

    def all_written(self) -> asyncio.Future[None]:
        """Done once everything handed in so far is written."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def set_written() -> None:
            if not written.done():
                written.set_result(None)

        self.when_written(set_written)
        return written

    async def run(self) -> None:
        """Write until cancelled."""
        failures = 0
        while True:
            await self._wake.wait()
            failures = 0 if await self.write_next() else failures + 1
            if failures:
                # Jitter: several services reconnect to a PostgreSQL that was restarted.
                await asyncio.sleep(random.uniform(RETRY_S_MIN, min(RETRY_S_MAX, RETRY_S_MIN * 2**failures)))

    async def write_next(self) -> bool:
        """Write what has gathered; False if the database does not answer."""
        self._wake.clear()
        batch, self._next = self._next, WriteBatch()
        callbacks, self._callbacks = self._callbacks, []
        ending, self._ending = self._ending, set()
        try:
            states = await self._store.write(batch)
        except Unavailable as error:
            self.available = False
            for put_id in ending:
                _settle(self._deciding.pop(put_id), error)
            self._retain(batch, callbacks)
            return False
        self.available = True
        for put_id in (*batch.voids, *(end[0] for end in batch.ends)):
            _settle(self._deciding.pop(put_id), states.get(put_id, ABSENT))
        for callback in callbacks:
            callback()
        return True

    def _retain(self, batch: WriteBatch, callbacks: list[Callable[[], None]]) -> None:
        later, self._next = self._next, batch
        batch.ends = later.ends
        for name in ("segments", "workers", "starts", "voids", "pages", "removals", "freed", "rules", "statements"):
            getattr(batch, name).extend(getattr(later, name))
        self._callbacks = callbacks + self._callbacks
        self._wake.set()

    def _decision(self, put_id: bytes) -> Decided:
        assert put_id not in self._deciding, "a put is decided once at a time"
        decided: Decided = asyncio.get_running_loop().create_future()
        self._deciding[put_id] = decided
        self._wake.set()
        return decided


async def confirmed(written: asyncio.Future[None]) -> None:
    """Wait for `Journal.all_written`. Raises Unavailable if that takes too long; it is written sooner or later."""
    try:
        await asyncio.wait_for(written, STATEMENT_TIMEOUT_S)
    except TimeoutError:
        raise Unavailable("the metadata database does not answer; try again") from None


def _settle(decided: Decided, outcome: str | Unavailable) -> None:
    if decided.done():
        return
    if isinstance(outcome, Unavailable):
        decided.set_exception(outcome)
    else:
        decided.set_result(outcome)
