"""Partitions of usage: made ahead, dropped when they are too old; and what has settled long ago cleared away.

Each DB node tries every hour; an advisory lock lets one of them do it. Nobody waits for it: partitions are there months ahead.
"""

from __future__ import annotations

import asyncio

import asyncpg

from stratakv.log import EventLogger
from stratakv.queries import load_queries
from stratakv.settings import DatabaseSettings, UsageSettings

log = EventLogger("dbnode.usage_upkeep")

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

_AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)
_queries = load_queries("dbnode")


class UsageUpkeep:
    """One round after the other, while `run` runs."""

    def __init__(self, database: DatabaseSettings, usage: UsageSettings) -> None:
        self._database = database
        self._usage = usage

    async def run(self) -> None:
        """Until cancelled."""
        if self._database.url is None:
            return
        while True:
            try:
                await self.tend()
            except _AWAY as error:
                log.warning("usage_upkeep_failed", error=type(error).__name__, detail=str(error))
                await asyncio.sleep(RETRY_S)
            else:
                await asyncio.sleep(INTERVAL_S)

    async def tend(self) -> bool:
        """One round; False if another DB node is at it. Raises what asyncpg raises."""
        connection = await asyncpg.connect(self._database.url, timeout=self._database.connect_timeout_s)
        try:
            if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", ADVISORY_LOCK):
                return False
            await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
            await self._tend(connection)
            return True
        finally:
            await connection.close(timeout=CLOSE_TIMEOUT_S)  # the lock goes with it

    async def _tend(self, connection: asyncpg.Connection) -> None:
        made = await connection.fetchval(_queries["make_usage_partitions"], MONTHS_AHEAD, timeout=STATEMENT_TIMEOUT_S)
        if made:
            log.info("usage_partitions_made", partitions=made)
        if self._usage.months_kept:
            dropped = await connection.fetch(
                _queries["drop_usage_partitions"], self._usage.months_kept, timeout=STATEMENT_TIMEOUT_S
            )
            if dropped:
                log.info("usage_partitions_dropped", partitions=", ".join(row[0] for row in dropped))
        while await self._clear(connection) == CLEARED_ROWS_MAX:
            pass

    async def _clear(self, connection: asyncpg.Connection) -> int:
        done = await connection.execute(
            _queries["clear_settled"], SETTLED_DAYS, CLEARED_ROWS_MAX, timeout=STATEMENT_TIMEOUT_S
        )
        return int(done.rpartition(" ")[2])
