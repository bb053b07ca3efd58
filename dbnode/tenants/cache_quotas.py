"""Carries tenants' cache limits from the metadata to the meta servers, and what tenants have in the pool back.

The meta servers hold tenants to the limits they were told last, and forget them when they end; so they are told again every few
seconds. Several DB nodes tell and write the same.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from dbnode.own_connection import AWAY, OwnConnection
from dbnode.scheduler.pool_view import MetaCalls
from dbnode.tenants.ledger import STATEMENT_TIMEOUT_S, queries
from stratakv.errors import StrataError
from stratakv.log import EventLogger
from stratakv.settings import DatabaseSettings
from stratakv.wire import Done, ListOwners, OwnerLimit, OwnerStates, SetOwnerLimits

log = EventLogger("dbnode.cache_quotas")

SYNC_S = 5.0
LIMITS_MAX = 20_000
"""Tenants that are told of: those with limits before those that only have something in the pool."""


class CacheQuotas:
    """Runs beside the quotas, on a connection of its own."""

    def __init__(self, settings: DatabaseSettings, meta: MetaCalls | None) -> None:
        self._settings = settings
        self._meta = meta
        self._connection = OwnConnection(settings, STATEMENT_TIMEOUT_S)
        self._is_warned = False

    async def run(self) -> None:
        """Until cancelled."""
        if self._settings.url is None or self._meta is None:
            return
        while True:
            try:
                await self.sync(self._meta)
                self._is_warned = False
            except (StrataError, *AWAY) as error:
                if not self._is_warned:
                    log.warning("cache_quotas_not_told", error=type(error).__name__, detail=str(error))
                self._is_warned = True
                if not isinstance(error, StrataError):
                    self.close()
            await asyncio.sleep(SYNC_S)

    def close(self) -> None:
        self._connection.drop()

    async def sync(self, meta: MetaCalls) -> None:
        """Once, both ways. Raises StrataError, or one of AWAY."""
        connection = await self._connection.get()
        rows = await connection.fetch(queries["cache_limits"], LIMITS_MAX)
        await meta.call(SetOwnerLimits([OwnerLimit(*row) for row in rows]), Done)
        memory: Counter[int] = Counter()
        disk: Counter[int] = Counter()
        for state in (await meta.call(ListOwners(), OwnerStates)).owners:
            memory[state.limit.owner] += state.memory_bytes
            disk[state.limit.owner] += state.disk_bytes
        owners = sorted(owner for owner in memory if memory[owner] or disk[owner])
        used = ([sizes[owner] for owner in owners] for sizes in (memory, disk))
        await connection.execute(queries["set_cache_usage"], owners, *used)
