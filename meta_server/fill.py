"""Background work on the tables: unpacks committed puts into blocks and replicas, takes removed pages out, drops old rows.

Nothing waits for it: until a put is filled, its row in put_sessions is the truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from meta_server.store import CONNECTION_ERRORS, QUERIES, Store, is_transient
from stratakv.log import EventLogger

FILL_INTERVAL_S = 0.5
FILL_PUTS_MAX = 32
"""Puts unpacked in one transaction."""
REMOVALS_MAX = 32
ROWS_MAX = 5000
PRUNE_INTERVAL_S = 60.0
KEEP_DECIDED_S = 3600.0
"""How long the outcome of a put is kept at least."""

_log = EventLogger("meta_server.fill")


class Filler:
    """One background task."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def run(self) -> None:
        """Work until cancelled; a database that is away is tried again."""
        loop = asyncio.get_running_loop()
        prune_at = loop.time()
        while True:
            try:
                while await self.fill_some():
                    pass
                if loop.time() >= prune_at:
                    await self.prune()
                    prune_at = loop.time() + PRUNE_INTERVAL_S
            except CONNECTION_ERRORS as error:
                if not is_transient(error):
                    raise
                _log.warning("fill_delayed", error=type(error).__name__, detail=str(error))
            await asyncio.sleep(FILL_INTERVAL_S)

    async def fill_some(self) -> bool:
        """One round; True if there may be more to do."""
        async with self._store.pool.acquire() as connection:
            removals = [row[0] for row in await connection.fetch(QUERIES["removals_to_apply"], REMOVALS_MAX)]
            filled = int((await connection.execute(QUERIES["fill_puts"], FILL_PUTS_MAX)).split()[-1])
            if filled == FILL_PUTS_MAX:
                return True
            if removals:
                await self._delete(connection, "apply_removals", removals)
        return len(removals) == REMOVALS_MAX

    async def prune(self) -> None:
        """Drop what nobody needs any more."""
        async with self._store.pool.acquire() as connection:
            while await self._delete(connection, "drop_dead_replicas", ROWS_MAX) == ROWS_MAX:
                pass
            await connection.execute(QUERIES["prune_puts"], KEEP_DECIDED_S)
            await connection.execute(QUERIES["prune_lost_puts"], KEEP_DECIDED_S)
            await connection.execute(QUERIES["prune_removals"])

    async def _delete(self, connection: Any, query: str, argument: object) -> int:
        """Delete replicas, and the blocks that then lie nowhere; how many replicas."""
        async with connection.transaction():
            gone: Sequence[Any] = await connection.fetch(QUERIES[query], argument)
            if gone:
                namespaces, keys = [row["namespace"] for row in gone], [row["key"] for row in gone]
                await connection.execute(QUERIES["drop_lost_blocks"], namespaces, keys)
        return len(gone)
