"""What conversations consist of: plain values."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

ID_BYTES = 24
ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One history, without its items."""

    id: str
    created_at: datetime
    expires_at: datetime
    metadata: Mapping[str, str]
    version: int
    """Counts changes."""
    num_items: int
    size_bytes: int
    forked_from: str | None


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """The tokens that an answer and its prompt consisted of, as far as an earlier answer has not kept them."""

    token_ids: tuple[int, ...] = field(repr=False)
    after_position: int | None
    """The answer whose tokens come before; None at the beginning."""
    end_chars: int
    """Of the text that all these tokens stand for."""
    text_digest: bytes


@dataclass(frozen=True, slots=True)
class Message:
    """What is said, by whom; not yet an item."""

    role: str
    content: str = field(repr=False)
    kept: KeptTokens | None = None

    @property
    def size_bytes(self) -> int:
        return len(self.content.encode())


@dataclass(frozen=True, slots=True)
class Item:
    """A message at its place."""

    id: str
    position: int
    message: Message
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to add the next messages, for a while."""

    conversation: Conversation
    turn_id: str
    items: tuple[Item, ...]
    answer: str | None = None
    """Of this turn, if it has been taken already."""


def new_conversation_id() -> str:
    return f"conv_{secrets.token_hex(ID_BYTES)}"


def new_item_id() -> str:
    return f"msg_{secrets.token_hex(ID_BYTES)}"
