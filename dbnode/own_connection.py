"""A connection to the metadata database for work that nobody waits for on `dbnode.metadata`'s: made when it is needed, and anew
when it was lost. Its owner uses it for one thing at a time.
"""

from __future__ import annotations

import contextlib

import asyncpg

from stratakv.settings import DatabaseSettings

AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)
"""What a database that is away, or refuses, is known by."""


class OwnConnection:
    """At most one at a time."""

    def __init__(self, settings: DatabaseSettings, statement_timeout_s: float) -> None:
        self._settings = settings
        self._statement_timeout_s = statement_timeout_s
        self._connection: asyncpg.Connection | None = None

    async def get(self) -> asyncpg.Connection:
        """Raises one of AWAY."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await asyncpg.connect(
                self._settings.url,
                timeout=self._settings.connect_timeout_s,
                command_timeout=self._statement_timeout_s,
            )
        return self._connection

    def drop(self) -> None:
        """It is of no use, or of no more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*AWAY):
                connection.terminate()
