"""Who is let in at the KVCM API's ports: with the token, or by name and password; anybody while there is neither (loopback only).

A password takes tens of milliseconds to check, on a thread of its own; who was let in is remembered, by a keyed hash of what was
sent, for as long as the account is the same.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import enum
import hashlib
import hmac
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from meta_server.kvcm.accounts import Account, Accounts, hash_password, matches
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.store import CONNECTION_ERRORS
from stratakv.errors import Overloaded, SetupError
from stratakv.log import EventLogger
from stratakv.process import is_loopback
from stratakv.settings import MetaSettings

CHECKS_WAITING_MAX = 64
KNOWN_MAX = 10_000
"""Credentials remembered; all are forgotten when there are more."""
ACCOUNTS_KEPT_S = 5.0
"""What a meta server that stands by has read of accounts is used so long."""
T = TypeVar("T")
SEND = "send `authorization: Bearer <token>`, or Basic with an account's name and password"
_log = EventLogger("meta_server.kvcm")


class Verdict(enum.Enum):
    """On a caller."""

    WELCOME = "welcome"
    UNKNOWN = "unknown"
    FORBIDDEN = "forbidden"
    """Known, but has not the role that is needed here."""
    LATER = "later"
    """Too many passwords wait to be checked, or the accounts have never been read."""


class Doorman:
    """One for all ports."""

    def __init__(
        self, token: str | None, accounts: Accounts, read: Callable[[], Awaitable[list[Account] | None]]
    ) -> None:
        """`read` gets the accounts from PostgreSQL, or None if they are known here, by the leader itself."""
        self._expected = f"Bearer {token}".encode() if token else None
        self._accounts = accounts
        self._read = read
        self._read_at = float("-inf")
        self._is_read = False
        self._reading = asyncio.Lock()
        self._checks = ThreadPoolExecutor(1, "kvcm-password")
        self._num_waiting = 0
        self._known: dict[bytes, Account] = {}
        self._secret = os.urandom(32)
        # An unknown name must take as long as a wrong password, or names could be guessed one by one.
        self._nobody = Account("", admin.ROLE_USER, hash_password(os.urandom(16).hex()))

    async def admit(self, authorization: str | bytes | None, role: int) -> Verdict:
        """Whether who sends this may call what needs the role."""
        given = authorization.encode() if isinstance(authorization, str) else authorization or b""
        if self._expected is not None and hmac.compare_digest(given, self._expected):
            return Verdict.WELCOME
        await self._refresh()
        if not self._is_read:
            return Verdict.LATER
        if self._expected is None and not len(self._accounts):
            return Verdict.WELCOME
        scheme, _, value = given.partition(b" ")
        if scheme.lower() != b"basic":
            return Verdict.UNKNOWN
        mark = hashlib.blake2b(given, key=self._secret).digest()
        account = self._known.get(mark)
        if account is None or self._accounts.get(account.name) != account:
            try:
                account = await self._check(value)
            except Overloaded:
                return Verdict.LATER
            if account is None:
                return Verdict.UNKNOWN
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known[mark] = account
        return Verdict.WELCOME if account.role == admin.ROLE_ADMIN or role == account.role else Verdict.FORBIDDEN

    def close(self) -> None:
        self._checks.shutdown(wait=False, cancel_futures=True)

    async def _check(self, value: bytes) -> Account | None:
        try:
            name, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        account = self._accounts.get(name) or self._nobody
        is_right = await self.is_right(password, account)
        return account if is_right and account is not self._nobody else None

    async def is_right(self, password: str, account: Account) -> bool:
        """Whether it is the account's. Raises Overloaded."""
        return await self._in_turn(partial(matches, password, account.password_hash))

    async def hash(self, password: str) -> str:
        """Raises Overloaded."""
        return await self._in_turn(partial(hash_password, password))

    async def _in_turn(self, work: Callable[[], T]) -> T:
        if self._num_waiting >= CHECKS_WAITING_MAX:
            raise Overloaded("too many passwords wait to be checked")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._checks, work)
        finally:
            self._num_waiting -= 1

    async def _refresh(self) -> None:
        """Ask PostgreSQL now and then where somebody else changes the accounts."""
        if time.monotonic() - self._read_at < ACCOUNTS_KEPT_S:
            return
        async with self._reading:
            if time.monotonic() - self._read_at < ACCOUNTS_KEPT_S:
                return
            try:
                accounts = await self._read()
            except CONNECTION_ERRORS as error:
                _log.warning("accounts_not_read", error=type(error).__name__)
            else:
                if accounts is not None:
                    self._accounts.replace(accounts)
                self._is_read = True
            self._read_at = time.monotonic()


@dataclass(frozen=True, slots=True)
class Door:
    """A port with the role that is needed there."""

    doorman: Doorman
    role: int

    async def admit(self, authorization: str | bytes | None) -> Verdict:
        return await self.doorman.admit(authorization, self.role)


def check_reachable(settings: MetaSettings) -> None:
    """Raises SetupError for listeners beyond this machine that would let anybody in, or let them listen."""
    if is_loopback(settings.kvcm_host):
        return
    where = f"meta.kvcm_host = {settings.kvcm_host}: will not listen beyond this machine without"
    if not settings.kvcm_token:
        raise SetupError(f"{where} a token", hint="Set meta.kvcm_token, and give it to the clients.")
    if settings.kvcm_tls_cert is None:
        raise SetupError(f"{where} TLS", hint="Set meta.kvcm_tls_cert and meta.kvcm_tls_key.")
