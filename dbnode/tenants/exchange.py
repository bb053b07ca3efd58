"""One exchange of the quotas with PostgreSQL: what is wanted, how what was granted is given out, what goes back.

All of it holds only once PostgreSQL has committed: `undo` is for when it has not. Free of I/O; made by `dbnode.tenants.quotas`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from dbnode.errors import QuotaExceeded
from dbnode.tenants.account import Account, Needs, Reservation
from dbnode.tenants.ledger import Granted
from stratakv.errors import Unavailable
from stratakv.tenancy.values import TOKEN_MICROS, LimitKind

Place = tuple[int, LimitKind]
"""A limit of a tenant."""


@dataclass(slots=True, eq=False)
class Ask:
    """Requests that need more than is held here, together or not at all."""

    account: Account
    needs: Needs
    reservations: list[Reservation]
    granted: asyncio.Future[None]

    def fail(self) -> None:
        """PostgreSQL is away."""
        if not self.granted.done():
            self.granted.set_exception(Unavailable("the metadata database does not answer"))


@dataclass(slots=True, eq=False)
class Exchange:
    """Of one transaction."""

    accounts: Mapping[int, Account]
    asks: list[Ask]
    now_s: float
    fresh: dict[Place, int] = field(default_factory=dict)
    """Granted now, and given to nobody yet."""
    refused: dict[int, QuotaExceeded] = field(default_factory=dict)
    """By the number of the ask."""
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def wanted(self) -> dict[Place, int]:
        """What is to be leased: for those who ask, for those who wait for a permit, and to fill slices up."""
        needed: dict[Place, int] = {}
        for ask in self.asks:
            for kind, micros in ask.needs.items():
                place = (ask.account.tenant.id, kind)
                needed[place] = needed.get(place, 0) + micros
        for tenant_id, account in self.accounts.items():
            if account.waiting:
                needed[tenant_id, LimitKind.PARALLEL] = len(account.waiting) * TOKEN_MICROS
            if account.is_low(self.now_s):
                needed |= {(tenant_id, kind): needed.get((tenant_id, kind), 0) for kind in account.slices}
        wanted: dict[Place, int] = {}
        for (tenant_id, kind), micros in needed.items():
            account = self.accounts[tenant_id]
            lacking = micros + account.ahead(kind, self.now_s) - account.held.get(kind, 0)
            if lacking > 0 and account.tenant.limits.of(kind) is not None:
                wanted[tenant_id, kind] = lacking
        return wanted

    def granted(self, granted: Mapping[Place, Granted]) -> None:
        for (tenant_id, kind), one in granted.items():
            self.fresh[tenant_id, kind] = one.granted_micros
            account = self.accounts[tenant_id]
            account.left[kind] = one.left_micros
            account.asked_at_s, account.month_ends_s = self.now_s, one.month_ends_s

    def distribute(self) -> list[Reservation]:
        """First come, first served: those that are."""
        served: list[Reservation] = []
        for number, ask in enumerate(self.asks):
            missing = next((kind for kind, micros in ask.needs.items() if self._at_hand(ask, kind) < micros), None)
            if missing is not None:
                lacking = ask.needs[missing] - self._at_hand(ask, missing)
                self.refused[number] = ask.account.refusal(missing, lacking, self.now_s)
                continue
            for kind, micros in ask.needs.items():
                place = (ask.account.tenant.id, kind)
                from_fresh = min(micros, self.fresh.get(place, 0))
                if from_fresh:
                    self.fresh[place] -= from_fresh
                if micros > from_fresh:
                    ask.account.add(kind, from_fresh - micros)
                    self._undo.append(partial(ask.account.add, kind, micros - from_fresh))
            served += ask.reservations
        return served

    def _at_hand(self, ask: Ask, kind: LimitKind) -> int:
        return self.fresh.get((ask.account.tenant.id, kind), 0) + ask.account.held.get(kind, 0)

    def enrolled(self, reservations: list[Reservation]) -> None:
        """PostgreSQL knows them: they are no longer part of a lease."""
        for reservation in reservations:
            reservation.account.count_enrolling(reservation, -1)
            self._undo.append(partial(reservation.account.count_enrolling, reservation, 1))

    def kept(self, *, all_places: bool) -> dict[Place, int]:
        """What is needed of leases of which there is too much, or of all. The rest is no longer held."""
        kept: dict[Place, int] = {}
        for tenant_id, account in self.accounts.items():
            # Of what was leased by an exchange whose answer was lost nothing is known here.
            unsure = LimitKind if all_places else ()
            for kind in {*account.held, *(k for t, k in self.fresh if t == tenant_id), *unsure}:
                place = (tenant_id, kind)
                held, fresh = account.held.get(kind, 0), self.fresh.get(place, 0)
                excess = max(0, held + fresh - account.ahead(kind, self.now_s) - account.awaited(kind))
                if excess or all_places:
                    kept[place] = account.given(kind) + held + fresh - excess
                from_fresh = min(excess, fresh)
                if from_fresh:
                    self.fresh[place] -= from_fresh
                if excess > from_fresh:
                    account.add(kind, from_fresh - excess)
                    self._undo.append(partial(account.add, kind, excess - from_fresh))
        return kept

    def commit(self) -> None:
        """PostgreSQL has it."""
        for (tenant_id, kind), micros in self.fresh.items():
            self.accounts[tenant_id].add(kind, micros)
        for number, ask in enumerate(self.asks):
            if ask.granted.done():
                continue
            if number in self.refused:
                ask.granted.set_exception(self.refused[number])
            else:
                ask.granted.set_result(None)

    def undo(self) -> None:
        """It has not, as far as is known."""
        for step in reversed(self._undo):
            step()
        for ask in self.asks:
            ask.fail()
