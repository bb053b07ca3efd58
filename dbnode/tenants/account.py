"""What a DB node holds for one tenant, and what a request needs of each limit. Free of I/O.

All amounts are in millionths of a request or a token. What is held was leased from PostgreSQL, so it is nobody else's.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dbnode.errors import QuotaExceeded
from stratakv.tenancy.values import TOKEN_MICROS, LimitKind, Tenant

SLICES = 64
"""A DB node leases so small a part of a limit ahead …"""
NEEDS_IN_SLICE_MIN = 8
"""… if that is enough for so many requests like the largest of late; else it takes what a request needs, and no more."""
LEASE_IDLE_S = 5.0
"""What was leased ahead and is not used for so long goes back."""

Needs = Mapping[LimitKind, int]
_WORDS = {
    LimitKind.REQUESTS_MINUTE: "requests per minute",
    LimitKind.TOKENS_MINUTE: "tokens per minute",
    LimitKind.PARALLEL: "parallel requests",
    LimitKind.TOKENS_MONTH: "tokens per month",
}


class Owner(Protocol):
    """Who keeps the books: `dbnode.tenants.quotas`."""

    def permit_returned(self, account: Account) -> None: ...

    def settled(self, reservation: Reservation, charged_micros: int) -> None: ...

    def forgotten(self, reservation: Reservation) -> None: ...


@dataclass(slots=True, eq=False)
class Reservation:
    """Of one request. Its owner ends it once."""

    request_id: str
    account: Account
    kinds: tuple[LimitKind, ...]
    tokens_micros: int
    owner: Owner = field(repr=False)
    has_permit: bool = False
    is_started: bool = False
    """A request has it."""
    is_ended: bool = False

    def release(self) -> None:
        """The request has ended; what it is charged may be decided later."""
        if self.has_permit:
            self.has_permit = False
            self.owner.permit_returned(self.account)

    def settle(self, charged_micros: int) -> None:
        """What the request took; the first time counts."""
        if not self.is_ended:
            self.is_ended = True
            self.release()
            self.owner.settled(self, charged_micros)

    def __del__(self) -> None:
        # Whoever had it was cancelled before it began, or between two steps; a request that ran settles.
        if not self.is_ended:
            self.is_ended = True
            self.owner.forgotten(self)


@dataclass(slots=True, eq=False)
class Account:
    """Of one tenant at one DB node."""

    tenant: Tenant
    held: dict[LimitKind, int] = field(default_factory=dict)
    """Leased and free."""
    enrolling: dict[LimitKind, int] = field(default_factory=dict)
    """Leased, and given to requests that PostgreSQL does not know yet."""
    in_use: int = 0
    """Permits of requests that run; leased too."""
    slices: dict[LimitKind, int] = field(default_factory=dict)
    """What is leased ahead while there are requests."""
    largest: dict[LimitKind, int] = field(default_factory=dict)
    """What a request needed."""
    left: dict[LimitKind, int] = field(default_factory=dict)
    """What nobody had taken when PostgreSQL was asked last."""
    asked_at_s: float = 0.0
    month_ends_s: float = 0.0
    """Seconds from then."""
    used_at_s: float = 0.0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)
    """Requests that wait for a permit."""

    def needs(self, tokens: int, requests: int) -> dict[LimitKind, int]:
        """Of so many tokens and requests. Raises QuotaExceeded if they can never be had."""
        limits = self.tenant.limits
        asked = {
            LimitKind.REQUESTS_MINUTE: requests,
            LimitKind.TOKENS_MINUTE: tokens,
            LimitKind.TOKENS_MONTH: tokens,
        }
        for kind, number in asked.items():
            limit = limits.of(kind)
            if limit is not None and number > limit:
                raise QuotaExceeded(f"{number} at once are more than the limit of {limit} {_WORDS[kind]}")
        return {kind: n * TOKEN_MICROS for kind, n in asked.items() if n and limits.of(kind) is not None}

    def missing(self, needs: Needs) -> LimitKind | None:
        """A limit of which less is held than is needed."""
        return next((kind for kind, micros in needs.items() if self.held.get(kind, 0) < micros), None)

    def take(self, needs: Needs) -> None:
        """For requests, out of what is held."""
        for kind, micros in needs.items():
            assert self.held[kind] >= micros
            self.held[kind] -= micros

    def count_enrolling(self, reservation: Reservation, sign: int) -> None:
        """PostgreSQL has got to know of a reservation, or has not after all."""
        for kind in reservation.kinds:
            micros = TOKEN_MICROS if kind is LimitKind.REQUESTS_MINUTE else reservation.tokens_micros
            self.enrolling[kind] = self.enrolling.get(kind, 0) + sign * micros

    def add(self, kind: LimitKind, micros: int) -> None:
        self.held[kind] = self.held.get(kind, 0) + micros

    def note_size(self, needs: Needs) -> None:
        """What is leased ahead follows the size of requests, the largest of late."""
        for kind, micros in {**needs, LimitKind.PARALLEL: TOKEN_MICROS}.items():
            limit = self.tenant.limits.of(kind)
            largest = self.largest[kind] = max(micros, self.largest.get(kind, 0))
            part = 0 if limit is None else limit // SLICES * TOKEN_MICROS
            self.slices[kind] = part if part >= NEEDS_IN_SLICE_MIN * largest else 0

    def is_low(self, now_s: float) -> bool:
        """Whether less than half is left of something that is to be leased ahead."""
        return any(2 * self.held.get(kind, 0) < self.ahead(kind, now_s) for kind in self.slices)

    def ahead(self, kind: LimitKind, now_s: float) -> int:
        """What is to be held: a slice, while there are requests."""
        is_idle = now_s - self.used_at_s >= LEASE_IDLE_S or self.tenant.limits.of(kind) is None
        return 0 if is_idle else self.slices.get(kind, 0)

    def awaited(self, kind: LimitKind) -> int:
        """What requests wait for."""
        return len(self.waiting) * TOKEN_MICROS if kind is LimitKind.PARALLEL else 0

    def given(self, kind: LimitKind) -> int:
        """What of a lease is given to requests."""
        return self.enrolling.get(kind, 0) + (self.in_use * TOKEN_MICROS if kind is LimitKind.PARALLEL else 0)

    def is_empty(self, now_s: float) -> bool:
        """Whether nothing is lost if it is forgotten."""
        amounts = (*self.held.values(), *self.enrolling.values(), self.in_use, len(self.waiting))
        return now_s - self.used_at_s >= LEASE_IDLE_S and not any(amounts)

    def refusal(self, kind: LimitKind, lacking: int, now_s: float) -> QuotaExceeded:
        """Of a request that lacks so much of a limit."""
        limit = self.tenant.limits.of(kind) or 0
        message = f"tenant {self.tenant.name} has reached its limit of {limit} {_WORDS[kind]}"
        if kind is LimitKind.TOKENS_MONTH:
            return QuotaExceeded(message, max(1.0, self.month_ends_s - (now_s - self.asked_at_s)))
        if kind is LimitKind.PARALLEL:
            return QuotaExceeded(message, 1.0)
        return QuotaExceeded(message, min(60.0, max(1.0, lacking * 60 / max(1, limit * TOKEN_MICROS))))

    def remaining(self, kind: LimitKind, now_s: float) -> tuple[int, int, float]:
        """Limit, what is left of it, and seconds until all of it is, as far as this DB node knows."""
        limit = self.tenant.limits.of(kind) or 0
        micros = limit * TOKEN_MICROS
        left = micros
        if kind in self.left:
            left = self.left[kind] + self.held.get(kind, 0) + round((now_s - self.asked_at_s) * micros / 60)
        left = max(0, min(micros, left))
        return limit, left // TOKEN_MICROS, 0.0 if not micros else math.ceil((micros - left) * 60_000 / micros) / 1000
