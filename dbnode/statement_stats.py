"""Statistics of statements in the metadata database: sums per role, database and statement, written in the background.

The sink of the SQL face's `StatementBook`, and what the view `stratakv.statement_stats` is read from. Several DB nodes add to
the same rows. While the database is away sums wait here, a bounded number of them. A role is known by its cluster, name and OID,
as in the mapping of roles to tenants, and sees what it did for its tenant.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dbnode.own_connection import AWAY, OwnConnection
from dbnode.sql.commands import FormerFunctions
from dbnode.sql.service import Login
from dbnode.sql.statement_meter import StatementCounts, StatementKey
from dbnode.sql.topics import Asked, Topic, Topics
from stratakv.errors import Unavailable
from stratakv.log import EventLogger
from stratakv.queries import load_queries
from stratakv.settings import DatabaseSettings

log = EventLogger("dbnode.statement_stats")

WAITING_MAX = 2000
"""Statements with sums that are not written yet."""
ROWS_MAX = 5000
"""Statements kept; those not seen for longest are dropped first."""
FLUSH_S = 2.0
RETRY_S_MAX = 30.0
PRUNE_S = 60.0
WRITE_TIMEOUT_S = 10.0

_NOT_TOLD = Login("", 0, "")
_queries = load_queries("dbnode")


@dataclass(slots=True)
class _Sum:
    counts: StatementCounts = field(default_factory=StatementCounts)
    seen_at_s: float = 0.0


class StatementStats:
    """Adds up; writes while `run` runs."""

    def __init__(self, settings: DatabaseSettings, on_dropped: Callable[[], None]) -> None:
        self._settings = settings
        self._on_dropped = on_dropped
        self._sums: dict[StatementKey, _Sum] = {}
        self._some = asyncio.Event()
        self._lock = asyncio.Lock()
        self._connection = OwnConnection(settings, WRITE_TIMEOUT_S)
        self._pruned_s = 0.0

    def add(self, key: StatementKey, counts: StatementCounts) -> None:
        if self._settings.url is None:
            return
        found = self._sums.get(key)
        if found is None and len(self._sums) >= WAITING_MAX:
            self._on_dropped()
            return
        if found is None:
            found = self._sums[key] = _Sum()
        found.counts.add(counts)
        found.seen_at_s = time.time()
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
            log.warning("statement_stats_lost", statements=len(self._sums))
        self._connection.drop()

    def topics(self) -> Topics:
        """`statements`: rows as JSON. PostgreSQL says whether the role may read those of `all` in its cluster."""
        return {"statements": Topic(self._answer)}

    async def _answer(self, asked: Asked) -> str:
        return json.dumps(
            await self.read(asked.role, asked.login, is_all=asked.payload.get("all") is True), default=str
        )

    async def read(self, role: str, login: Login | None, *, is_all: bool) -> list[dict[str, Any]]:
        """Rows of a role of its login's tenant, or all of its cluster, with what has not been written yet.

        Raises Unavailable, or PermissionDenied if the functions do not tell who asks.
        """
        if login is None or login.caller_oid is None or not login.cluster:
            raise FormerFunctions("the functions in this database do not say which role asks for its statistics")
        if self._settings.url is None or not await self._flush():
            raise Unavailable("the metadata database does not answer")
        whose = (login.cluster, is_all, role, login.caller_oid, login.role, login.oid)
        async with self._lock:
            try:
                rows = await (await self._connection.get()).fetch(_queries["select_statements"], *whose)
            except AWAY as error:
                self._lost(error)
                raise Unavailable("the metadata database does not answer") from error
        return [dict(row) for row in rows]

    async def _flush(self) -> bool:
        """Write all sums; False if the database is away. One whose acknowledgement is lost is written again."""
        async with self._lock:
            if not self._sums:
                return True
            sums, self._sums = self._sums, {}
            self._some.clear()
            try:
                await self._write(sums)
            except AWAY as error:
                self._lost(error)
                self._put_back(sums)
                return False
            except BaseException:
                self._put_back(sums)
                raise
            return True

    async def _write(self, sums: dict[StatementKey, _Sum]) -> None:
        connection = await self._connection.get()
        rows = [_row(key, found) for key, found in sums.items()]
        await connection.execute(_queries["add_statements"], *zip(*rows, strict=True))
        if time.monotonic() - self._pruned_s > PRUNE_S:
            self._pruned_s = time.monotonic()
            await connection.execute(_queries["prune_statements"], ROWS_MAX)

    def _put_back(self, sums: dict[StatementKey, _Sum]) -> None:
        for key, found in sums.items():
            self.add(key, found.counts)

    def _lost(self, error: BaseException) -> None:
        log.warning("statement_stats_not_written", statements=len(self._sums), error=type(error).__name__)
        self._connection.drop()


def _row(key: StatementKey, found: _Sum) -> tuple[Any, ...]:
    """Columns in the order of the query's parameters."""
    counts = (getattr(found.counts, name) for name in StatementCounts.__slots__)
    fingerprint = hashlib.sha256(key.query.encode()).digest()[:16] if key.query is not None else b""
    login = key.login or _NOT_TOLD
    whose = (login.cluster, login.role, login.oid, key.role, login.caller_oid or 0, key.database)
    return *whose, fingerprint, key.query, *counts, found.seen_at_s
