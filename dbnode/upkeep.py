"""Upkeep of the metadata: partitions of usage made ahead, and what is older than it is to be kept taken away.

Each DB node tries every hour; an advisory lock lets one of them do it. Nobody waits for it: partitions are there months ahead.
"""

from __future__ import annotations

import asyncio
import time

import asyncpg

from dbnode.metrics import UpkeepMetrics
from dbnode.own_connection import AWAY
from stratakv.log import EventLogger
from stratakv.queries import load_queries
from stratakv.settings import DatabaseSettings, TenantSettings, UsageSettings

log = EventLogger("dbnode.upkeep")

ADVISORY_LOCK = 0x5354_5241_5441_0002
MONTHS_AHEAD = 3
SETTLED_DAYS = 8
"""A request id is known for so long. Nobody writes one so late: events wait in memory, and count as at most a week old."""
CLEARED_ROWS_MAX = 5000
"""In one transaction."""
INTERVAL_S = 3600.0
RETRY_S = 60.0
LOCK_TIMEOUT_S = 2
"""A partition that cannot be had at once is tried again later: readers and writers do not queue behind it."""
STATEMENT_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
DAY_S = 86400.0

_queries = load_queries("dbnode")


class Upkeep:
    """One round after the other, while `run` runs."""

    def __init__(
        self, database: DatabaseSettings, usage: UsageSettings, tenants: TenantSettings, metrics: UpkeepMetrics
    ) -> None:
        self._database = database
        self._usage = usage
        self._tenants = tenants
        self._metrics = metrics
        self._covered_until_s = 0.0
        metrics.days_ahead.set_function(self._days_ahead)

    def _days_ahead(self) -> float:
        return max(0.0, self._covered_until_s - time.monotonic()) / DAY_S

    async def run(self) -> None:
        """Until cancelled."""
        if self._database.url is None:
            return
        while True:
            try:
                await self.tend()
            except AWAY as error:
                self._metrics.failures.inc()
                log.warning("upkeep_failed", error=type(error).__name__, detail=str(error))
                await asyncio.sleep(RETRY_S)
            else:
                await asyncio.sleep(INTERVAL_S)

    async def tend(self) -> bool:
        """One round; False if another DB node is at it. Raises what asyncpg raises."""
        connection = await asyncpg.connect(self._database.url, timeout=self._database.connect_timeout_s)
        try:
            is_ours = bool(await connection.fetchval("SELECT pg_try_advisory_lock($1)", ADVISORY_LOCK))
            if is_ours:
                await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
                await self._make_partitions(connection)
            ahead_s = await connection.fetchval(_queries["usage_ahead"], MONTHS_AHEAD, timeout=STATEMENT_TIMEOUT_S)
            self._covered_until_s = time.monotonic() + ahead_s
            if is_ours:
                await self._clear_away(connection)
            return is_ours
        finally:
            await connection.close(timeout=CLOSE_TIMEOUT_S)  # the lock goes with it

    async def _make_partitions(self, connection: asyncpg.Connection) -> None:
        made = await connection.fetchval(_queries["make_usage_partitions"], MONTHS_AHEAD, timeout=STATEMENT_TIMEOUT_S)
        if made:
            self._metrics.partitions_made.inc(made)
            log.info("usage_partitions_made", partitions=made)

    async def _clear_away(self, connection: asyncpg.Connection) -> None:
        """What is over. Partitions come last: a long look at one keeps it from being dropped."""
        await _delete(connection, "clear_settled", SETTLED_DAYS)
        if self._tenants.audit_months_kept:
            deleted = await _delete(connection, "clear_audit", self._tenants.audit_months_kept)
            if deleted:
                self._metrics.audit_deleted.inc(deleted)
                log.info("audit_entries_deleted", entries=deleted)
        if self._usage.months_kept:
            dropped = await connection.fetch(
                _queries["drop_usage_partitions"], self._usage.months_kept, timeout=STATEMENT_TIMEOUT_S
            )
            if dropped:
                self._metrics.partitions_dropped.inc(len(dropped))
                log.info("usage_partitions_dropped", partitions=", ".join(row[0] for row in dropped))


async def _delete(connection: asyncpg.Connection, query: str, age: int) -> int:
    """All rows of that age or older, a bounded number in each transaction; how many they were."""
    total = 0
    while True:
        done = await connection.execute(_queries[query], age, CLEARED_ROWS_MAX, timeout=STATEMENT_TIMEOUT_S)
        deleted = int(done.rpartition(" ")[2])
        total += deleted
        if deleted < CLEARED_ROWS_MAX:
            return total
