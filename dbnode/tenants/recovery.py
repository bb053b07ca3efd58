"""What DB nodes that are gone have left open: leases go back, reservations are settled from what workers have written down.

Every DB node looks for it; whichever is first does it. Nothing depends on its being done once: a reservation is settled once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import asyncpg

from dbnode.own_connection import AWAY, OwnConnection
from dbnode.tenants.ledger import DEAD_S, SETTLED, STATEMENT_TIMEOUT_S, UNSETTLED, queries
from stratakv.log import EventLogger
from stratakv.settings import DatabaseSettings
from stratakv.tenancy.values import TOKEN_MICROS

log = EventLogger("dbnode.quotas")

LOOK_S = 5.0
RETRY_S = 10.0
UNSETTLED_AFTER_S = 120.0
"""Workers that are away may come back with what they have written down; but not for longer than this after the DB node was seen."""
BATCH_MAX = 500
SETTLED_KEPT_S = 24 * 3600.0
UNSETTLED_KEPT_S = 32 * 24 * 3600.0
PRUNE_S = 600.0
PRUNE_ROWS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Ended:
    """What a request took, as workers have written it down."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int

    def micros(self, cached_token_micros: int) -> int:
        """What is charged for it."""
        computed = self.prompt_tokens - self.cached_tokens + self.generated_tokens
        return computed * TOKEN_MICROS + self.cached_tokens * cached_token_micros


@dataclass(frozen=True, slots=True)
class Journals:
    """What all workers together know of some requests."""

    ended: Mapping[str, Ended]
    are_complete: bool
    """Every worker has answered."""


ReadJournals = Callable[[Sequence[str]], Awaitable[Journals]]


class Recovery:
    """Runs beside the quotas, on a connection of its own."""

    def __init__(self, settings: DatabaseSettings, read_journals: ReadJournals) -> None:
        self._settings = settings
        self._read_journals = read_journals
        self._connection = OwnConnection(settings, STATEMENT_TIMEOUT_S)
        self._is_warned = False

    async def run(self) -> None:
        """Until cancelled."""
        if self._settings.url is None:
            return
        prune_at_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self.recover()
                if loop.time() >= prune_at_s:
                    prune_at_s = loop.time() + PRUNE_S
                    await self._run("prune_reservations", SETTLED_KEPT_S, UNSETTLED_KEPT_S, PRUNE_ROWS_MAX)
                self._is_warned = False
                await asyncio.sleep(LOOK_S)
            except AWAY as error:
                if not self._is_warned:
                    log.warning("quotas_not_recovered", error=type(error).__name__)
                self._is_warned = True
                self.close()
                await asyncio.sleep(RETRY_S)

    def close(self) -> None:
        self._connection.drop()

    async def recover(self) -> None:
        """Once, all DB nodes that are gone. Raises one of AWAY."""
        for row in await self._run("dead_nodes", DEAD_S):
            await self._recover_node(row["node"], row["silent_s"])

    async def _recover_node(self, node: str, silent_s: float) -> None:
        connection = await self._connection.get()
        async with connection.transaction():
            if not await self._run("lock_dead_node", node, DEAD_S):
                return
            await self._run("free_leases", node)
        while rows := await self._run("open_reservations", node, BATCH_MAX):
            known = await self._read_journals([row["request_id"] for row in rows])
            charged = {
                row["request_id"]: ended.micros(row["cached_token_micros"])
                for row in rows
                if (ended := known.ended.get(row["request_id"])) is not None
            }
            rest = [row["request_id"] for row in rows if row["request_id"] not in charged]
            await self._run("settle", list(charged), list(charged.values()), SETTLED)
            if rest and not known.are_complete and silent_s < UNSETTLED_AFTER_S:
                log.info("reservations_wait_for_workers", node=node, reservations=len(rest))
                return
            await self._run("settle", rest, [None] * len(rest), UNSETTLED)
            log.info("reservations_recovered", node=node, settled=len(charged), unsettled=len(rest))
        await self._run("forget_node", node)

    async def _run(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        return list(await (await self._connection.get()).fetch(queries[query], *arguments))
