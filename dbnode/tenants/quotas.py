"""What tenants may take: reserved before a request does anything, settled once when it has ended.

Several DB nodes share the limits through PostgreSQL. What a request needs is taken there, with that of all others that ask at the
same time; of large limits a slice is leased ahead, so that most requests find what they need here. Asked by `dbnode.inference`.
Requests of tenants without limits never come here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

from dbnode.errors import QuotaExceeded
from dbnode.own_connection import AWAY
from dbnode.tenants.account import Account, Reservation
from dbnode.tenants.exchange import Ask, Exchange
from dbnode.tenants.ledger import GivenUp, Ledger
from stratakv.errors import DeadlineExceeded, Unavailable
from stratakv.log import EventLogger
from stratakv.settings import TenantSettings, WhenAway
from stratakv.tenancy.values import TOKEN_MICROS, LimitKind, Tenant

log = EventLogger("dbnode.quotas")

BEAT_S = 3.0
LEASE_S = 10.0
"""So long after the last word from PostgreSQL what is held here may be used; less than until a DB node is given up."""
PERMIT_POLL_S = 0.1
"""How often PostgreSQL is asked for permits that other DB nodes may have given back."""
ASK_TIMEOUT_S = 5.0
RETRY_S = 1.0
RECORDS_WAITING_MAX = 20_000
"""Reservations and settlements that PostgreSQL has not got yet; beyond that requests with limits are refused."""
ACCOUNTS_MAX = 20_000


class Quotas:
    """Of one DB node. `run` keeps it going; `close` gives everything back."""

    def __init__(self, ledger: Ledger, settings: TenantSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._settings = settings
        self._clock = clock
        self._accounts: dict[int, Account] = {}
        self._asks: deque[Ask] = deque()
        self._to_enrol: deque[Reservation] = deque()
        self._to_settle: dict[str, int] = {}
        self._lost_permits: deque[Account] = deque()
        """Of reservations that nobody has ended."""
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._heard_at_s = float("-inf")
        self._is_uncertain = False
        """PostgreSQL did not answer the last time: it may have committed or not."""

    # What requests ask

    async def reserve(
        self, request_id: str, tenant: Tenant, tokens: int, deadline_s: float, *, requests: int = 1
    ) -> Reservation | None:
        """Room for a request of at most so many tokens, and a permit to run; None if nothing is limited.

        Raises QuotaExceeded, Unavailable, DeadlineExceeded.
        """
        if not tenant.limits.is_limited:
            return None
        reservations = await self.reserve_all([(request_id, tokens)], tenant, deadline_s, requests=requests)
        if not reservations:
            return None
        try:
            await self.permit(reservations[0], deadline_s)
        except BaseException:
            reservations[0].settle(0)
            raise
        return reservations[0]

    async def reserve_all(
        self, asked: list[tuple[str, int]], tenant: Tenant, deadline_s: float, *, requests: int = 1
    ) -> list[Reservation]:
        """Room for several requests or for none of them; each needs a permit of its own then. Empty if nothing is limited."""
        if not tenant.limits.is_limited:
            return []
        account = self._account(tenant)
        needs = account.needs(sum(tokens for _, tokens in asked), requests * len(asked))
        made = [
            Reservation(request_id, account, tuple(needs), tokens * TOKEN_MICROS, self) for request_id, tokens in asked
        ]
        account.note_size({kind: micros // len(asked) for kind, micros in needs.items()})
        if not needs:
            return made
        if len(self._to_enrol) + len(self._to_settle) > RECORDS_WAITING_MAX:
            _drop(made)
            raise Unavailable("too many requests wait for their quota to be written down")
        if self._is_heard and account.missing(needs) is None:
            account.take(needs)
            for reservation in made:
                account.count_enrolling(reservation, 1)
            self._to_enrol.extend(made)
            self._wake.set()
            return made
        if self._is_uncertain:
            _drop(made)
            return self._unasked()
        ask = Ask(account, needs, made, asyncio.get_running_loop().create_future())
        self._asks.append(ask)
        self._wake.set()
        try:
            is_granted = await self._granted(ask, deadline_s)
        except QuotaExceeded:
            _drop(made)
            raise
        return made if is_granted else []

    async def permit(self, reservation: Reservation, deadline_s: float) -> None:
        """Wait until the request may run beside the others of its tenant. Raises QuotaExceeded, DeadlineExceeded."""
        account = reservation.account
        limit = account.tenant.limits.parallel_requests
        if limit is None or reservation.has_permit:
            return
        if limit == 0:
            raise account.refusal(LimitKind.PARALLEL, TOKEN_MICROS, self._clock())
        if account.waiting or not (self._is_heard and account.held.get(LimitKind.PARALLEL, 0) >= TOKEN_MICROS):
            if len(account.waiting) >= self._settings.parallel_waiting_max:
                raise account.refusal(LimitKind.PARALLEL, TOKEN_MICROS, self._clock())
            await self._wait_for_permit(account, deadline_s)
        else:
            self._give_permit(account)
        reservation.has_permit = True

    def headers(self, tenant: Tenant) -> dict[str, str]:
        """Of a REST answer: limits, what is left of them, and when all of it will be."""
        if not tenant.limits.is_limited:
            return {}
        account, now_s = self._account(tenant), self._clock()
        told: dict[str, str] = {}
        for name, kind in (("requests", LimitKind.REQUESTS_MINUTE), ("tokens", LimitKind.TOKENS_MINUTE)):
            if tenant.limits.of(kind) is not None:
                limit, left, reset_s = account.remaining(kind, now_s)
                told[f"x-ratelimit-limit-{name}"] = str(limit)
                told[f"x-ratelimit-remaining-{name}"] = str(left)
                told[f"x-ratelimit-reset-{name}"] = f"{reset_s:g}s"
        return told

    @property
    def _is_heard(self) -> bool:
        return self._clock() - self._heard_at_s < LEASE_S

    def _account(self, tenant: Tenant) -> Account:
        account = self._accounts.get(tenant.id)
        if account is None:
            if len(self._accounts) >= ACCOUNTS_MAX:
                raise Unavailable(f"{ACCOUNTS_MAX} tenants with limits are served already")
            account = self._accounts[tenant.id] = Account(tenant)
        account.tenant = tenant
        account.used_at_s = self._clock()
        return account

    async def _granted(self, ask: Ask, deadline_s: float) -> bool:
        """False: it may go on without a reservation."""
        try:
            async with asyncio.timeout_at(min(deadline_s, asyncio.get_running_loop().time() + ASK_TIMEOUT_S)):
                await asyncio.shield(ask.granted)
        except (TimeoutError, asyncio.CancelledError, Unavailable) as error:
            if ask in self._asks:
                self._asks.remove(ask)
                ask.granted.cancel()
                _drop(ask.reservations)
            else:  # on its way: it is given back if it is granted
                ask.granted.add_done_callback(lambda done: _undo(done, ask.reservations))
            if isinstance(error, asyncio.CancelledError):
                raise
            self._unasked()
            return False
        return True

    def _unasked(self) -> list[Reservation]:
        """PostgreSQL is away, and not enough is held here. Raises Unavailable, unless such requests may go on."""
        if self._settings.when_away is WhenAway.ALLOW:
            return []
        raise Unavailable("the quotas cannot be asked: the metadata database does not answer")

    async def _wait_for_permit(self, account: Account, deadline_s: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        account.waiting.append(waiter)
        self._wake.set()
        try:
            async with asyncio.timeout_at(deadline_s):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.permit_returned(account)  # it was given just when it gave up
            elif waiter in account.waiting:
                account.waiting.remove(waiter)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(
                    "the request's deadline passed while it waited for others of its tenant"
                ) from None
            raise

    def _give_permit(self, account: Account) -> None:
        account.held[LimitKind.PARALLEL] -= TOKEN_MICROS
        account.in_use += 1

    def permit_returned(self, account: Account) -> None:
        """To be given to the next one."""
        account.in_use -= 1
        account.add(LimitKind.PARALLEL, TOKEN_MICROS)
        self._give_permits(account)
        self._wake.set()

    def _give_permits(self, account: Account) -> None:
        while account.waiting and account.held.get(LimitKind.PARALLEL, 0) >= TOKEN_MICROS:
            waiter = account.waiting.popleft()
            if not waiter.done():
                self._give_permit(account)
                waiter.set_result(None)

    # What reservations tell

    def settled(self, reservation: Reservation, charged_micros: int) -> None:
        if reservation.kinds:
            self._to_settle[reservation.request_id] = charged_micros
            self._wake.set()

    def forgotten(self, reservation: Reservation) -> None:
        """Told by whatever thread has found it."""
        if reservation.has_permit:
            self._lost_permits.append(reservation.account)
        if reservation.kinds:
            self._to_settle[reservation.request_id] = reservation.tokens_micros if reservation.is_started else 0

    # What PostgreSQL is told and asked

    async def run(self) -> None:
        """Until cancelled."""
        is_warned = False
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERMIT_POLL_S if self._is_waited_for else BEAT_S):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.flush()
                is_warned = False
            except AWAY as error:
                if not is_warned:
                    log.warning("quotas_not_written", error=type(error).__name__, waiting=len(self._to_settle))
                is_warned = True
                await asyncio.sleep(RETRY_S)

    async def flush(self) -> None:
        """One exchange with PostgreSQL, if there is something to tell or to ask. Raises one of AWAY; asks fail then."""
        async with self._lock:
            if not (self._ledger.node or self._asks or self._is_waited_for or self._is_uncertain):
                return
            while self._lost_permits:
                self.permit_returned(self._lost_permits.popleft())
            asks = list(self._asks)
            self._asks.clear()
            exchange = Exchange(self._accounts, asks, self._clock())
            try:
                await self._exchange(exchange)
                self._is_uncertain = False
            except GivenUp:
                log.warning("quotas_given_up", node=self._ledger.node)
                exchange.undo()
                self._start_anew()
            except BaseException:
                self._is_uncertain = True
                exchange.undo()
                raise
            self._forget_idle()

    async def _exchange(self, exchange: Exchange) -> None:
        sent_at_s = self._clock()
        settled, enrolled = dict(self._to_settle), list(self._to_enrol)
        async with self._ledger.transaction():
            await self._ledger.beat()
            await self._ledger.enrol(enrolled)
            exchange.enrolled(enrolled)
            await self._ledger.settle(settled)
            if wanted := exchange.wanted():
                exchange.granted(await self._ledger.take(wanted))
            await self._ledger.enrol(exchange.distribute())
            await self._ledger.keep(exchange.kept(all_places=self._is_uncertain))
        exchange.commit()
        self._heard_at_s = sent_at_s
        for _ in enrolled:
            self._to_enrol.popleft()
        for request_id in settled:
            del self._to_settle[request_id]
        for account in self._accounts.values():
            self._give_permits(account)

    def _start_anew(self) -> None:
        """What was held is others' by now; what runs goes on, and is settled by whoever took over."""
        self._ledger.forget()
        for ask in self._asks:
            ask.fail()
        for account in self._accounts.values():
            for waiter in account.waiting:
                if not waiter.done():
                    waiter.set_exception(Unavailable("the metadata database did not answer for too long"))
        self._asks.clear()
        self._accounts.clear()
        self._to_enrol.clear()
        self._heard_at_s = float("-inf")

    def _forget_idle(self) -> None:
        now_s = self._clock()
        for tenant_id in [number for number, account in self._accounts.items() if account.is_empty(now_s)]:
            del self._accounts[tenant_id]

    @property
    def _is_waited_for(self) -> bool:
        return any(account.waiting for account in self._accounts.values())

    async def close(self) -> None:
        """Settle what has ended and give back what is held, if PostgreSQL is there."""
        for account in self._accounts.values():
            account.used_at_s = float("-inf")
        try:
            await self.flush()
            await self._ledger.close()
        except AWAY as error:
            log.warning("quotas_not_given_back", error=type(error).__name__, waiting=len(self._to_settle))
            self._ledger.drop()


def _undo(granted: asyncio.Future[None], reservations: list[Reservation]) -> None:
    """Nobody waits for them any more."""
    if granted.cancelled() or granted.exception() is not None:
        _drop(reservations)
        return
    for reservation in reservations:
        reservation.settle(0)


def _drop(reservations: list[Reservation]) -> None:
    """They were never granted: there is nothing to settle."""
    for reservation in reservations:
        reservation.is_ended = True
