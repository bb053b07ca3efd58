"""Accounts of the KVCM API: name, role and a hash of the password, by scrypt. Changed by AdminService, asked by `doorman`.

They are in PostgreSQL. A leader changes them; a meta server that stands by reads them again while it is asked.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass

from meta_server.kvcm.entities import check_name
from meta_server.kvcm.errors import Duplicate
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from stratakv.errors import InvalidRequest, Overloaded

ACCOUNTS_MAX = 10_000
PASSWORD_CHARS_MIN = 8
PASSWORD_CHARS_MAX = 1024
SCRYPT_LOG_N = 15
SCRYPT_R = 8
_SALT_BYTES = 16
_SCRYPT_BYTES_MAX = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Account:
    """One of them."""

    name: str
    role: int
    """Of the API's AccountRole."""
    password_hash: str

    def __repr__(self) -> str:
        return f"Account({self.name!r}, {self.role})"


def hash_password(password: str) -> str:
    """`scrypt$<log n>$<r>$<salt>$<hash>`, with a salt of its own. Takes tens of milliseconds."""
    salt = os.urandom(_SALT_BYTES)
    hashed = _scrypt(password, salt, SCRYPT_LOG_N, SCRYPT_R)
    return "$".join(("scrypt", str(SCRYPT_LOG_N), str(SCRYPT_R), _text(salt), _text(hashed)))


def matches(password: str, password_hash: str) -> bool:
    """Whether it is the password of that hash. Takes tens of milliseconds."""
    _, log_n, r, salt, hashed = password_hash.split("$")
    return hmac.compare_digest(_scrypt(password, base64.b64decode(salt), int(log_n), int(r)), base64.b64decode(hashed))


class Accounts:
    """All accounts, by name."""

    def __init__(self, *, has_token: bool) -> None:
        """With a token there is a way in beside the accounts."""
        self._has_token = has_token
        self._by_name: dict[str, Account] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Account | None:
        return self._by_name.get(name)

    def all(self) -> list[Account]:
        return [self._by_name[name] for name in sorted(self._by_name)]

    def replace(self, accounts: Iterable[Account]) -> None:
        """What PostgreSQL has."""
        self._by_name = {account.name: account for account in accounts}

    def check_new(self, name: str, password: str, role: int) -> None:
        """Raises InvalidRequest, Overloaded."""
        check_name("user_name", name)
        if ":" in name:
            raise InvalidRequest("user_name must not have a colon", param="user_name")
        if not PASSWORD_CHARS_MIN <= len(password) <= PASSWORD_CHARS_MAX:
            raise InvalidRequest(
                f"password must have {PASSWORD_CHARS_MIN} to {PASSWORD_CHARS_MAX} characters", param="password"
            )
        if role not in (admin.ROLE_USER, admin.ROLE_ADMIN):
            raise InvalidRequest(f"there is no role {role}", param="role")
        if role != admin.ROLE_ADMIN and not self._has_token and not self._admins():
            raise InvalidRequest(
                "the first account must be an administrator's: nobody else could add more", param="role"
            )
        if len(self._by_name) >= ACCOUNTS_MAX:
            raise Overloaded(f"there are {ACCOUNTS_MAX} accounts, which is the limit")

    def add(self, account: Account) -> None:
        """Raises Duplicate."""
        if account.name in self._by_name:
            raise Duplicate(f"account {account.name} is there already, with another role or password")
        self._by_name[account.name] = account

    def remove(self, name: str) -> None:
        """Raises InvalidRequest."""
        account = self._by_name.get(name)
        if account is None:
            raise InvalidRequest(f"there is no account {name!r}", param="user_name")
        if len(self._by_name) > 1 and not self._has_token and self._admins() == [account]:
            raise InvalidRequest(
                f"{name} is the last administrator; remove the other accounts first", param="user_name"
            )
        del self._by_name[name]

    def _admins(self) -> list[Account]:
        return [account for account in self._by_name.values() if account.role == admin.ROLE_ADMIN]


def _scrypt(password: str, salt: bytes, log_n: int, r: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=1 << log_n, r=r, p=1, maxmem=_SCRYPT_BYTES_MAX)


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()
