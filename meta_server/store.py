"""The truth, in PostgreSQL: reads the snapshot at the start, writes batches of changes, answers what became of a put.

All writing goes over connections that say for which term they write, or changes what no two meta servers can do differently;
PostgreSQL refuses every term but the latest (migration 0006). So a meta server that was replaced while frozen writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import asyncpg

from meta_server.records import CommittedRun, OpenRemoval, Snapshot, StartedPut, WriteBatch
from stratakv.errors import SetupError, Unavailable
from stratakv.log import EventLogger
from stratakv.pool.meta_errors import NotLeader
from stratakv.queries import load_queries
from stratakv.settings import DatabaseSettings
from stratakv.wire import CacheRule, Segment

QUERIES = load_queries("meta_server")
STATEMENT_TIMEOUT_S = 5.0
IDLE_IN_TRANSACTION_MS = 5_000
"""A leader that is frozen within a transaction would hold up its successor; PostgreSQL ends that."""
OTHER_TERM = "SK001"
"""SQLSTATE of a write that was refused because another meta server leads."""
DEAD_EPOCHS_MAX = 10_000
DECIDED_MAX = 100_000
"""Decided puts kept in memory; older ones are asked for here."""

_TRANSIENT_CLASSES = frozenset({"08", "25", "40", "53", "55", "57", "58"})
"""SQLSTATE classes that pass: connection, read-only standby, rollback, resources, locks, operator, system."""
CONNECTION_ERRORS = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)
"""InternalClientError: asyncpg's state after the server ended a session that was idle."""
_log = EventLogger("meta_server.store")


class Store:
    """Three ways to PostgreSQL: `durable`, `lazy` (synchronous_commit off), and a pool for the rest."""

    def __init__(
        self, url: str, settings: DatabaseSettings, term: int = 0, on_other_term: Callable[[], None] | None = None
    ) -> None:
        """`on_other_term` is called when PostgreSQL refuses a write because `term` is over."""
        self._url = url
        self._settings = settings
        self._term = term
        self._on_other_term = on_other_term
        self._durable: asyncpg.Connection | None = None
        self._lazy: asyncpg.Connection | None = None
        self._pool: asyncpg.Pool | None = None

    @property
    def pool(self) -> asyncpg.Pool:
        """For reads and background work."""
        assert self._pool is not None, "the store is not open"
        return self._pool

    async def open(self) -> None:
        """Connect. Raises SetupError."""
        try:
            await self._connect()
            self._pool = await asyncpg.create_pool(
                self._url,
                min_size=1,
                max_size=max(2, self._settings.pool_connections_max),
                timeout=self._settings.connect_timeout_s,
                command_timeout=6 * STATEMENT_TIMEOUT_S,
            )
        except CONNECTION_ERRORS as error:
            raise SetupError(f"database.url: cannot connect: {error or type(error).__name__}") from error

    async def close(self) -> None:
        """End all connections."""
        if self._pool is not None:
            self._pool.terminate()
        self._disconnect()

    async def load(self) -> Snapshot:
        """Everything as of one moment."""
        async with self.pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            return Snapshot(
                segments=[Segment(**row) for row in await connection.fetch(QUERIES["live_segments"])],
                dead_epochs=[row[0] for row in await connection.fetch(QUERIES["dead_epochs"], DEAD_EPOCHS_MAX)],
                runs=[
                    CommittedRun(**row)
                    for name in ("replica_runs", "unfilled_puts")
                    for row in await connection.fetch(QUERIES[name], timeout=None)
                ],
                pending=[StartedPut(**row) for row in await connection.fetch(QUERIES["pending_puts"])],
                decided=dict(await connection.fetch(QUERIES["decided_puts"], DECIDED_MAX)),
                removals=[OpenRemoval(**row) for row in await connection.fetch(QUERIES["open_removals"])],
                last_removal_id=await connection.fetchval(QUERIES["last_removal"]),
                rules=[CacheRule(**row) for row in await connection.fetch(QUERIES["cache_rules"])],
            )

    async def put_states(self, put_ids: Iterable[bytes]) -> dict[bytes, str]:
        """put_id → pending, committed or void; unknown puts are absent. Raises Unavailable."""
        try:
            rows = await self.pool.fetch(QUERIES["put_states"], list(put_ids), timeout=STATEMENT_TIMEOUT_S)
        except CONNECTION_ERRORS as error:
            raise database_unavailable(error) from error
        return {row["put_id"]: row["state"] for row in rows}

    async def write(self, batch: WriteBatch) -> dict[bytes, str]:
        """Write a batch; the state of each put in `voids` and `ends`. Safe to repeat. Raises Unavailable.

        An Unavailable leaves open which changes were made; a connection that failed is replaced at the next call.
        """
        try:
            if self._durable is None or self._lazy is None or self._durable.is_closed() or self._lazy.is_closed():
                await self._connect()
            return await self._write(batch)
        except CONNECTION_ERRORS as error:
            self._disconnect()
            if getattr(error, "sqlstate", None) == OTHER_TERM:
                if self._on_other_term is not None:
                    self._on_other_term()
                raise NotLeader("another meta server leads") from None
            if not is_transient(error):
                raise
            raise database_unavailable(error) from error

    async def _write(self, batch: WriteBatch) -> dict[bytes, str]:
        durable, lazy = self._durable, self._lazy
        assert durable is not None
        assert lazy is not None
        for s in batch.segments:
            async with durable.transaction():
                await durable.execute(QUERIES["add_node"], s.node)
                await durable.execute(QUERIES["end_older_segments"], s.node, s.epoch)
                await durable.execute(
                    QUERIES["add_segment"], s.epoch, s.node, s.host, s.port, s.socket_name, s.size_bytes, s.disk_of
                )
        for w in batch.workers:
            row = (w.worker, w.epoch, w.url, w.role.value, w.model, w.namespace, w.block_size, w.max_model_len, w.node)
            await lazy.execute(QUERIES["add_worker"], *row)
        if batch.starts:
            await lazy.execute(QUERIES["start_puts"], *_columns(batch.starts))
        if batch.voids:
            await durable.execute(QUERIES["void_puts"], batch.voids)
        if batch.ends:
            await durable.execute(QUERIES["end_puts"], [e[0] for e in batch.ends], [e[1] for e in batch.ends])
        if batch.pages:
            pages = [
                (put_id, p.namespace, p.epoch, p.page_bytes, p.keys, p.extents, p.owner) for put_id, p in batch.pages
            ]
            await durable.execute(QUERIES["add_pages"], *map(list, zip(*pages, strict=True)))
        if batch.removals:
            removals = [(m.id, m.epoch, m.extents, m.page_bytes, m.reason) for m in batch.removals]
            await durable.execute(QUERIES["add_removals"], *map(list, zip(*removals, strict=True)))
        if batch.freed:
            await lazy.execute(QUERIES["finish_removals"], batch.freed)
        for r in batch.rules:
            await durable.execute(
                QUERIES["set_cache_rule"], r.namespace, r.ttl_s, r.memory_bytes_max, r.disk_bytes_max, r.is_kept
            )
        if batch.statements:
            async with durable.transaction():
                for statement in batch.statements:
                    await durable.execute(statement.sql, *statement.arguments)
        decided = [*batch.voids, *(end[0] for end in batch.ends)]
        if not decided:
            return {}
        return {row["put_id"]: row["state"] for row in await durable.fetch(QUERIES["put_states"], decided)}

    async def _connect(self) -> None:
        self._disconnect()
        self._durable = await self._session("on")
        self._lazy = await self._session("off")

    async def _session(self, synchronous_commit: str) -> asyncpg.Connection:
        connection = await asyncpg.connect(
            self._url,
            timeout=self._settings.connect_timeout_s,
            command_timeout=STATEMENT_TIMEOUT_S,
            server_settings={
                "application_name": "stratakv meta server",
                "synchronous_commit": synchronous_commit,
                "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
            },
        )
        await connection.execute(QUERIES["set_term"], str(self._term))
        return connection

    def _disconnect(self) -> None:
        for connection in (self._durable, self._lazy):
            if connection is not None and not connection.is_closed():
                connection.terminate()
        self._durable = self._lazy = None


def is_transient(error: BaseException) -> bool:
    """Whether the same statement may succeed later."""
    sqlstate = getattr(error, "sqlstate", None)
    return not isinstance(sqlstate, str) or sqlstate[:2] in _TRANSIENT_CLASSES


def database_unavailable(error: BaseException) -> Unavailable:
    """What a client is told while PostgreSQL does not answer."""
    _log.warning("database_unavailable", error=type(error).__name__, detail=str(error))
    return Unavailable("the metadata database does not answer; try again")


def _columns(starts: list[StartedPut]) -> list[list[object]]:
    rows = [
        (p.put_id, p.namespace, p.epoch, p.worker, p.page_bytes, p.block_size, p.keys, p.left_s, p.owner)
        for p in starts
    ]
    return [list(column) for column in zip(*rows, strict=True)]
