"""Keeps an embedded PostgreSQL alive while the process that owns it runs: starts it again when it has died."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stratakv.errors import SetupError
from stratakv.log import EventLogger
from stratakv.postgres.cluster import EmbeddedPostgres

POLL_S = 0.5
RESTARTS_MAX = 5
_log = EventLogger("stratakv.postgres")


async def keep_running(cluster: EmbeddedPostgres, restarted: Callable[[], None] = lambda: None) -> None:
    """Until it is cancelled, on the thread that started the cluster. Raises SetupError if it dies again and again."""
    num_restarts = 0
    while True:
        await asyncio.sleep(POLL_S)
        if cluster.is_running():
            continue
        num_restarts += 1
        if num_restarts > RESTARTS_MAX:
            raise SetupError(f"PostgreSQL died {num_restarts} times.", hint=f"Its log is {cluster.log_file}.")
        _log.warning("database_died", restarts=num_restarts)
        # Blocks this loop for the second it takes: the server must be a child of this very thread.
        cluster.restart()
        restarted()
