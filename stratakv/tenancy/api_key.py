"""API keys of tenants: how one is made, what of it may be shown, and what is kept of it.

A key is 256 random bits, so a plain SHA-256 of it cannot be turned back, and costs a request a microsecond.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field

MARK = "skv-"
"""What every key begins with; nothing else that clients send as a key does."""
KEY_CHARS_MAX = 256
_PREFIX_BYTES = 4
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key as it is shown once."""

    prefix: str
    """`skv-` and eight digits; may be shown."""
    key: str = field(repr=False)

    @property
    def key_hash(self) -> bytes:
        return hash_of(self.key)


def new_key() -> NewKey:
    """One that nobody has."""
    prefix = MARK + secrets.token_hex(_PREFIX_BYTES)
    return NewKey(prefix, f"{prefix}-{secrets.token_urlsafe(_SECRET_BYTES)}")


def shown_part(text: str) -> str:
    """The beginning of a key that may be shown, also if all of the key was given."""
    return text[: len(MARK) + 2 * _PREFIX_BYTES] if text.startswith(MARK) else text


def hash_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).digest()
