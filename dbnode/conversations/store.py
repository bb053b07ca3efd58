"""Conversations in the metadata database. Each change is one transaction, which holds the row of the conversation.

A turn has two: one that reserves it, and one, when the answer is there, that adds what was said. In between nothing is locked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import asyncpg

from dbnode.conversations.errors import (
    ConversationBusy,
    ConversationChanged,
    ConversationFull,
    ConversationNotFound,
    TooManyConversations,
)
from dbnode.conversations.values import (
    Conversation,
    Item,
    KeptTokens,
    Message,
    Turn,
    new_conversation_id,
    new_item_id,
)
from dbnode.metadata import Metadata
from stratakv.queries import load_queries
from stratakv.settings import ConversationsSettings

SWEPT_MAX = 500
_queries = load_queries("dbnode.conversations")


class ConversationStore:
    """All methods raise Unavailable if the database does not answer, and ConversationNotFound where an id is given."""

    def __init__(self, metadata: Metadata, settings: ConversationsSettings) -> None:
        self._metadata = metadata
        self._settings = settings

    @property
    def is_there(self) -> bool:
        """Whether there is a database at all."""
        return self._metadata.is_configured

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[asyncpg.Connection]:
        async with self._metadata.connection() as connection, connection.transaction():
            yield connection

    async def create(
        self, tenant_id: int, metadata: Mapping[str, str], messages: Sequence[Message] = ()
    ) -> Conversation:
        """Raises TooManyConversations, ConversationFull."""
        async with self._transaction() as connection:
            conversation = await self._insert(connection, tenant_id, metadata, None)
            if not messages:
                return conversation
            await self._grow(connection, conversation, messages, None)
            return await _conversation(connection, tenant_id, conversation.id)

    async def fork(
        self, tenant_id: int, conversation_id: str, at_item: str | None, metadata: Mapping[str, str] | None
    ) -> Conversation:
        """A new one with the same items up to `at_item`, or all. Raises TooManyConversations."""
        async with self._transaction() as connection:
            origin = await _conversation(connection, tenant_id, conversation_id, lock=True)
            last = origin.num_items
            if at_item is not None:
                last = (await _item(connection, conversation_id, at_item)).position
            given = origin.metadata if metadata is None else metadata
            made = await self._insert(connection, tenant_id, given, origin.id)
            size = await connection.fetchrow(_queries["copy_items"], origin.id, made.id, last)
            await connection.execute(_queries["grow"], made.id, *size, None, self._settings.ttl_s)
            return await _conversation(connection, tenant_id, made.id)

    async def get(self, tenant_id: int, conversation_id: str) -> Conversation:
        async with self._metadata.connection() as connection:
            return await _conversation(connection, tenant_id, conversation_id)

    async def newest(self, tenant_id: int, after: str | None, limit: int) -> list[Conversation]:
        """The newest first."""
        async with self._metadata.connection() as connection:
            rows = await connection.fetch(_queries["conversations"], tenant_id, after, limit)
        return [_made(row) for row in rows]

    async def change_metadata(self, tenant_id: int, conversation_id: str, metadata: Mapping[str, str]) -> Conversation:
        async with self._transaction() as connection:
            await connection.execute(
                _queries["change_metadata"], tenant_id, conversation_id, json.dumps(dict(metadata))
            )
            return await _conversation(connection, tenant_id, conversation_id)

    async def delete(self, tenant_id: int, conversation_id: str) -> None:
        async with self._metadata.connection() as connection:
            await _conversation(connection, tenant_id, conversation_id)
            if await connection.fetchval(_queries["delete_conversation"], tenant_id, conversation_id) is None:
                raise _not_found(conversation_id)

    async def item(self, tenant_id: int, conversation_id: str, item_id: str) -> Item:
        async with self._metadata.connection() as connection:
            await _conversation(connection, tenant_id, conversation_id)
            return await _item(connection, conversation_id, item_id)

    async def items(
        self, tenant_id: int, conversation_id: str, after: str | None, limit: int, *, is_ascending: bool
    ) -> list[Item]:
        """Without their tokens, from behind the item `after`."""
        async with self._metadata.connection() as connection:
            conversation = await _conversation(connection, tenant_id, conversation_id)
            place = -1 if is_ascending else conversation.num_items
            if after is not None:
                place = (await _item(connection, conversation_id, after)).position
            query = _queries["items_after" if is_ascending else "items_before"]
            return [_item_of(row) for row in await connection.fetch(query, conversation_id, place, limit)]

    async def add(
        self, tenant_id: int, conversation_id: str, messages: Sequence[Message], version: int | None
    ) -> tuple[Conversation, list[Item]]:
        """Raises ConversationBusy, ConversationChanged, ConversationFull."""
        async with self._transaction() as connection:
            found = await _conversation(connection, tenant_id, conversation_id, lock=True)
            await _demand_free(connection, tenant_id, found, version)
            await self._grow(connection, found, messages, None)
            rows = await connection.fetch(_queries["items_after"], conversation_id, found.num_items - 1, len(messages))
            return await _conversation(connection, tenant_id, conversation_id), [_item_of(row) for row in rows]

    # Turns

    async def begin_turn(
        self, tenant_id: int, conversation_id: str, turn_id: str, lasts_s: float, version: int | None
    ) -> Turn:
        """Nobody else may add anything for `lasts_s` seconds. Raises ConversationBusy, ConversationChanged.

        A turn that is taken already is told with its answer.
        """
        async with self._transaction() as connection:
            found = await _conversation(connection, tenant_id, conversation_id, lock=True)
            items = tuple(_item_of(row) for row in await connection.fetch(_queries["items"], conversation_id))
            row = await connection.fetchrow(_queries["conversation"], tenant_id, conversation_id)
            if row["last_turn_id"] == turn_id and items:
                return Turn(found, turn_id, items, items[-1].message.content)
            if row["turn_id"] != turn_id:
                await _demand_free(connection, tenant_id, found, version)
            await connection.execute(_queries["begin_turn"], conversation_id, turn_id, lasts_s)
            return Turn(found, turn_id, items)

    async def end_turn(self, tenant_id: int, turn: Turn, messages: Sequence[Message]) -> Conversation:
        """Add what was said. Raises ConversationBusy if the turn has lasted so long that another one took its place."""
        conversation_id = turn.conversation.id
        async with self._transaction() as connection:
            found = await _conversation(connection, tenant_id, conversation_id, lock=True)
            row = await connection.fetchrow(_queries["conversation"], tenant_id, conversation_id)
            if row["turn_id"] != turn.turn_id:
                raise ConversationBusy("the turn has lasted too long; another one has begun")
            await self._grow(connection, found, messages, turn.turn_id)
            return await _conversation(connection, tenant_id, conversation_id)

    async def give_up_turn(self, turn: Turn) -> None:
        async with self._metadata.connection() as connection:
            await connection.execute(_queries["give_up_turn"], turn.conversation.id, turn.turn_id)

    def check_room(self, conversation: Conversation, messages: Sequence[Message], num_more: int = 0) -> None:
        """`num_more` messages will follow, whose length is not known yet. Raises ConversationFull."""
        num_items = conversation.num_items + len(messages) + num_more
        if num_items > self._settings.items_max:
            raise ConversationFull(
                f"the conversation would have {num_items} items, more than {self._settings.items_max}",
                hint="Start a new one, or fork it at an earlier item.",
            )
        size_bytes = conversation.size_bytes + sum(message.size_bytes for message in messages)
        if size_bytes > self._settings.bytes_max:
            raise ConversationFull(
                f"the conversation would have {size_bytes} bytes, more than {self._settings.bytes_max}",
                hint="Start a new one, or fork it at an earlier item.",
            )

    async def sweep(self) -> int:
        """Delete some that have ended; how many."""
        async with self._metadata.connection() as connection:
            done = await connection.execute(_queries["sweep"], SWEPT_MAX)
        return int(done.rpartition(" ")[2])

    async def count_open(self) -> int:
        """Of all tenants."""
        async with self._metadata.connection() as connection:
            return int(await connection.fetchval(_queries["count_open"]))

    async def _insert(
        self, connection: asyncpg.Connection, tenant_id: int, metadata: Mapping[str, str], origin: str | None
    ) -> Conversation:
        most = self._settings.per_tenant_max
        if await connection.fetchval(_queries["count_conversations"], tenant_id, most) >= most:
            raise TooManyConversations(
                f"the tenant has {most} conversations, which is the limit", hint="Delete some, or let them end."
            )
        made_id = new_conversation_id()
        given = json.dumps(dict(metadata))
        await connection.execute(
            _queries["insert_conversation"], made_id, tenant_id, given, origin, self._settings.ttl_s
        )
        return await _conversation(connection, tenant_id, made_id)

    async def _grow(
        self,
        connection: asyncpg.Connection,
        conversation: Conversation,
        messages: Sequence[Message],
        turn_id: str | None,
    ) -> None:
        self.check_room(conversation, messages)
        rows = [
            (conversation.num_items + number, new_item_id(), message.role, message.content, *_columns(message.kept))
            for number, message in enumerate(messages)
        ]
        await connection.execute(_queries["insert_items"], conversation.id, *zip(*rows, strict=True))
        size_bytes = sum(message.size_bytes for message in messages)
        await connection.execute(
            _queries["grow"], conversation.id, len(rows), size_bytes, turn_id, self._settings.ttl_s
        )


async def _conversation(
    connection: asyncpg.Connection, tenant_id: int, conversation_id: str, *, lock: bool = False
) -> Conversation:
    """Raises ConversationNotFound."""
    query = _queries["conversation"] + (" FOR UPDATE" if lock else "")
    row = None
    if "\0" not in conversation_id:  # which PostgreSQL could not even be asked about
        row = await connection.fetchrow(query, tenant_id, conversation_id)
    if row is None:
        raise _not_found(conversation_id)
    return _made(row)


async def _item(connection: asyncpg.Connection, conversation_id: str, item_id: str) -> Item:
    row = None
    if "\0" not in item_id:
        row = await connection.fetchrow(_queries["item"], conversation_id, item_id)
    if row is None:
        raise ConversationNotFound(f"there is no item {item_id[:80]!r} in this conversation")
    return _item_of(row)


async def _demand_free(
    connection: asyncpg.Connection, tenant_id: int, found: Conversation, version: int | None
) -> None:
    """Raises ConversationBusy, ConversationChanged."""
    row = await connection.fetchrow(_queries["conversation"], tenant_id, found.id)
    if row["is_busy"]:
        raise ConversationBusy("another turn of this conversation is under way", hint="Try again when it has ended.")
    if version is not None and version != found.version:
        raise ConversationChanged(
            f"the conversation is at version {found.version}, not {version}", hint="Read what is new in it first."
        )


def _not_found(conversation_id: str) -> ConversationNotFound:
    return ConversationNotFound(f"there is no conversation {conversation_id[:80]!r}")


def _made(row: Mapping[str, Any]) -> Conversation:
    return Conversation(
        id=row["id"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        metadata=json.loads(row["metadata"]),
        version=row["version"],
        num_items=row["num_items"],
        size_bytes=row["size_bytes"],
        forked_from=row["forked_from"],
    )


def _item_of(row: Mapping[str, Any]) -> Item:
    created_at: datetime = row["created_at"]
    kept = None
    if row.get("token_ids") is not None:
        kept = KeptTokens(_unpacked(row["token_ids"]), row["after_position"], row["end_chars"], row["text_digest"])
    return Item(row["item_id"], row["position"], Message(row["role"], row["content"], kept), created_at)


def _columns(kept: KeptTokens | None) -> tuple[object, ...]:
    if kept is None:
        return None, None, None, None
    return _packed(kept.token_ids), kept.after_position, kept.end_chars, kept.text_digest


def _packed(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f">{len(token_ids)}I", *token_ids)


def _unpacked(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(packed) // 4}I", packed)
