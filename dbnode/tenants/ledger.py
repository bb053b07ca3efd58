"""The quotas' side in PostgreSQL: one connection, one transaction at a time, everything by arrays.

Called by `dbnode.tenants.quotas`. Every statement but `take` may be repeated, so that a commit whose answer was lost does no harm;
what `take` has leased then goes back with the next `keep`.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from dbnode.own_connection import OwnConnection
from dbnode.tenants.account import Reservation
from stratakv.errors import Unavailable
from stratakv.queries import load_queries
from stratakv.settings import DatabaseSettings
from stratakv.tenancy.values import LimitKind

STATEMENT_TIMEOUT_S = 5.0
DEAD_S = 20.0
"""A DB node that is silent for so long is given up, and never let back under its name."""
OPEN, SETTLED, UNSETTLED = "open", "settled", "unsettled"
queries = load_queries("dbnode.tenants", "quota.sql")
_Place = tuple[int, LimitKind]


class GivenUp(Unavailable):
    """This DB node was silent for too long: what it held is no longer its own."""


@dataclass(frozen=True, slots=True)
class Granted:
    """Of one tenant and kind."""

    granted_micros: int
    left_micros: int
    month_ends_s: float


class Ledger:
    """A start of this DB node, as PostgreSQL knows it."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self._connection = OwnConnection(settings, STATEMENT_TIMEOUT_S)
        self._in_use: asyncpg.Connection | None = None
        """Of the transaction that runs; a statement of it never goes to another one."""
        self._known: set[_Place] = set()
        self.node = ""
        """Its name; empty until it holds something."""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Raises one of AWAY. Whatever ends it but its end, the connection is made anew then."""
        try:
            self._in_use = await self._connection.get()
            async with self._in_use.transaction():
                yield
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """The connection is of no use."""
        self._connection.drop()

    async def _run(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        assert self._in_use is not None
        return list(await self._in_use.fetch(queries[query], *arguments))

    async def beat(self) -> None:
        """Say that we live. Raises GivenUp."""
        if not self.node:
            self.node = uuid.uuid4().hex
            await self._run("enlist", self.node)
        elif not await self._run("beat", self.node, DEAD_S):
            raise GivenUp("this DB node was silent for too long")

    async def take(self, wanted: Mapping[_Place, int]) -> dict[_Place, Granted]:
        """As much as is left of what is wanted."""
        new = [place for place in wanted if place not in self._known]
        if new:
            await self._run("ensure_state", [t for t, _ in new], [k.value for _, k in new])
            self._known.update(new)
        rows = await self._run("take", self.node, *_columns(wanted))
        return {
            (row["tenant_id"], LimitKind(row["kind"])): Granted(row["granted"], row["left_micros"], row["month_ends_s"])
            for row in rows
        }

    async def enrol(self, reservations: Sequence[Reservation]) -> None:
        """Move what they reserve from leases to them."""
        if reservations:
            await self._run(
                "enrol",
                self.node,
                [r.request_id for r in reservations],
                [r.account.tenant.id for r in reservations],
                [",".join(r.kinds) for r in reservations],
                [r.tokens_micros for r in reservations],
            )

    async def settle(self, charged: Mapping[str, int]) -> None:
        """By request id; once each."""
        if charged:
            await self._run("settle", list(charged), list(charged.values()), SETTLED)

    async def keep(self, kept: Mapping[_Place, int]) -> None:
        """Give back what is leased beyond this."""
        if kept:
            await self._run("keep", self.node, *_columns(kept))

    async def close(self) -> None:
        """Leave nothing behind but what is still open."""
        if self.node:
            async with self.transaction():
                await self._run("drop_empty_leases", self.node)
                await self._run("forget_node", self.node)
        self.drop()

    def forget(self) -> None:
        """Be another one from now on."""
        self.node = ""
        self._known.clear()


def _columns(amounts: Mapping[_Place, int]) -> Iterable[object]:
    ordered = sorted(amounts)
    return [t for t, _ in ordered], [k.value for _, k in ordered], [amounts[place] for place in ordered]
