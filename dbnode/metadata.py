"""The metadata database for what a request waits for: a few connections, made when they are needed.

What is written in the background (usage, statistics) has connections of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from stratakv.errors import Unavailable
from stratakv.log import EventLogger
from stratakv.settings import DatabaseSettings

log = EventLogger("dbnode.metadata")

QUERY_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 5.0
_AWAY = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    TimeoutError,
)
"""As opposed to a statement that the database refuses."""


class Metadata:
    """A pool that is opened by its first user."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self._settings = settings
        self._pool: asyncpg.Pool | None = None
        self._opening = asyncio.Lock()

    @property
    def is_configured(self) -> bool:
        return self._settings.url is not None

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """One of the connections. Raises Unavailable, also if the database goes away inside."""
        if self._settings.url is None:
            raise Unavailable("this DB node has no metadata database", hint="Set STRATAKV_DATABASE_URL.")
        try:
            pool = await self._opened()
            async with pool.acquire(timeout=QUERY_TIMEOUT_S) as connection:
                yield connection
        except _AWAY as error:
            log.warning("metadata_away", error=type(error).__name__)
            raise Unavailable("the metadata database does not answer") from error

    async def close(self) -> None:
        if self._pool is None:
            return
        try:
            await asyncio.wait_for(self._pool.close(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            self._pool.terminate()

    async def _opened(self) -> asyncpg.Pool:
        async with self._opening:
            if self._pool is None:
                self._pool = await asyncpg.create_pool(
                    self._settings.url,
                    min_size=0,
                    max_size=self._settings.pool_connections_max,
                    timeout=self._settings.connect_timeout_s,
                    command_timeout=QUERY_TIMEOUT_S,
                )
            return self._pool
