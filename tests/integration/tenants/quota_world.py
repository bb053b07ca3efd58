"""Several DB nodes' quotas over one real PostgreSQL, whose answers can be lost, and what is in there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import asyncpg

from dbnode.own_connection import AWAY
from dbnode.tenants.account import Reservation
from dbnode.tenants.ledger import Ledger
from dbnode.tenants.quotas import Quotas
from dbnode.tenants.recovery import Ended, Journals, Recovery
from stratakv.errors import StrataError
from stratakv.settings import DatabaseSettings, Secret, TenantSettings
from stratakv.tenancy.values import Limits, Tenant

BROKEN = (
    "SELECT s.tenant_id, s.kind, s.held_micros, l.micros, r.micros FROM stratakv.quota_state s"
    " LEFT JOIN LATERAL (SELECT coalesce(sum(amount_micros), 0) AS micros FROM stratakv.quota_leases l"
    "   WHERE (l.tenant_id, l.kind) = (s.tenant_id, s.kind)) l ON true"
    " LEFT JOIN LATERAL (SELECT coalesce(sum(reserved_micros), 0) AS micros FROM stratakv.reservations r"
    "   WHERE r.tenant_id = s.tenant_id AND r.state = 'open' AND s.kind = ANY (r.kinds) AND s.kind LIKE 'tokens%') r ON true"
    " WHERE s.held_micros <> l.micros + r.micros"
)
"""Whatever is held must be a lease or an open reservation."""
TAKEN = "SELECT q.spent_micros + q.held_micros FROM stratakv.quota_state q WHERE q.tenant_id = $1 AND q.kind = 'tokens_month'"


EXCHANGES_MAX = 3
"""For tokens, for a permit, and once more."""


class UnsureLedger(Ledger):
    """Loses answers on command: PostgreSQL has committed then, or has not."""

    lose_next: str = ""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        lose, self.lose_next = self.lose_next, ""
        async with super().transaction():
            yield
            if lose == "before":
                self.drop()
                raise ConnectionResetError("lost before the commit")
        if lose == "after":
            self.drop()
            raise ConnectionResetError("lost after the commit")


@dataclass
class NodeAtWork:
    """One start of a DB node."""

    ledger: UnsureLedger
    quotas: Quotas
    kept: list[Reservation] = field(default_factory=list)
    """What nobody keeps would end by itself."""

    async def reserve(self, request_id: str, tenant: Tenant, tokens: int) -> Reservation | StrataError:
        """With the exchange that it may need."""
        deadline_s = asyncio.get_running_loop().time() + 5
        asking = asyncio.ensure_future(self.quotas.reserve(request_id, tenant, tokens, deadline_s))
        for _ in range(EXCHANGES_MAX):
            await asyncio.sleep(0)
            if not asking.done():
                await self.flush()
        try:
            reservation = await asking
        except StrataError as error:
            return error
        assert reservation is not None
        self.kept.append(reservation)
        return reservation

    async def flush(self) -> None:
        with suppress(*AWAY):
            await self.quotas.flush()


class QuotaWorld:
    """What tests play with."""

    def __init__(self, url: str, settings: TenantSettings | None = None) -> None:
        self.database = DatabaseSettings(url=Secret(url))
        self.settings = settings or TenantSettings()
        self.journal: dict[str, Ended] = {}
        self.workers_answer = True
        self._recovery = Recovery(self.database, self._read)
        self.nodes: list[NodeAtWork] = []

    async def start(self, num_nodes: int) -> None:
        self.sql = await asyncpg.connect(self.database.url)
        self.nodes = [self.node() for _ in range(num_nodes)]

    def node(self) -> NodeAtWork:
        ledger = UnsureLedger(self.database)
        return NodeAtWork(ledger, Quotas(ledger, self.settings))

    def crash(self, number: int) -> None:
        """It ends without a word; another one comes in its place."""
        self.nodes[number].ledger.drop()
        self.nodes[number] = self.node()

    async def tenant(self, name: str, limits: Limits) -> Tenant:
        tenant_id = await self.sql.fetchval("INSERT INTO stratakv.tenants (name) VALUES ($1) RETURNING id", name)
        await self.sql.execute(
            "INSERT INTO stratakv.tenant_limits (tenant_id, requests_per_minute, tokens_per_minute, parallel_requests,"
            " tokens_per_month) VALUES ($1, $2, $3, $4, $5)",
            tenant_id,
            limits.requests_per_minute,
            limits.tokens_per_minute,
            limits.parallel_requests,
            limits.tokens_per_month,
        )
        return Tenant(tenant_id, name, limits=limits)

    async def pass_time(self, seconds: float) -> None:
        """For what leaks."""
        await self.sql.execute("UPDATE stratakv.quota_state SET at = at - make_interval(secs => $1)", seconds)

    async def silence(self, node: str, seconds: float) -> None:
        """PostgreSQL has not heard of a DB node for longer by so much."""
        await self.sql.execute(
            "UPDATE stratakv.quota_nodes SET seen_at = seen_at - make_interval(secs => $2) WHERE node = $1",
            node,
            seconds,
        )

    async def recover(self) -> None:
        await self._recovery.recover()

    async def broken(self) -> list[asyncpg.Record]:
        return list(await self.sql.fetch(BROKEN))

    async def taken(self, tenant: Tenant) -> int:
        return int(await self.sql.fetchval(TAKEN, tenant.id) or 0)

    async def close(self) -> None:
        for node in self.nodes:
            node.ledger.drop()
        self._recovery.close()
        await self.sql.close()

    async def _read(self, request_ids: Sequence[str]) -> Journals:
        known = {name: self.journal[name] for name in request_ids if name in self.journal}
        return Journals(known, self.workers_answer)
