"""Conversations of the SQL face: what `stratakv.infer_chat` and its kin ask over the private listener.

The tenant is that of the role that has logged in. What they do is done, also if the statement's transaction is rolled back.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from dbnode.conversations.service import Conversations
from dbnode.conversations.values import Message
from dbnode.generate import Answer, Caller, GenerateRequest, Source
from dbnode.sql.commands import NulInAnswer
from dbnode.sql.topics import Asked, Topic, Topics
from dbnode.sql_inference import caller_of
from dbnode.sql_options import OPTIONS, checked_options, sampling
from dbnode.tenants.directory import Directory
from stratakv.errors import InvalidRequest

ITEMS_TOLD_MAX = 10_000
_NOT_HERE = frozenset({"system", "on_error", "dedupe"})
"""Options of infer() that say nothing of a turn."""


class SqlConversations:
    """A handler for each topic."""

    def __init__(self, conversations: Conversations, directory: Directory) -> None:
        self._conversations = conversations
        self._store = conversations.store
        self._directory = directory

    def topics(self) -> Topics:
        return {
            "chat": Topic(self._chat, has_effects=True),
            "conversationcreate": Topic(self._create, has_effects=True),
            "conversationfork": Topic(self._fork, has_effects=True),
            "conversationdelete": Topic(self._delete, has_effects=True),
            "conversationitems": Topic(self._items),
        }

    async def _chat(self, asked: Asked) -> str:
        arrived_s = time.monotonic()
        caller = caller_of(asked, self._directory)
        options = _options(asked.payload.get("options"))
        deadline_s = arrived_s + options["timeout_ms"] / 1e3 if "timeout_ms" in options else None
        request = GenerateRequest(
            request_id=f"sql-{uuid.uuid4().hex}",  # a turn that is tried again is another request
            source=Source.SQL,
            arrived_s=arrived_s,
            messages=({"role": "user", "content": asked.payload["message"]},),
            sampling=sampling(options),
            priority=options.get("priority", 0),
            cache_salt=options.get("cache_salt"),
            deadline_s=deadline_s,
            caller=caller,
        )
        answer = Answer()
        conversation, turn_id = asked.payload["conversation"], asked.payload["turn"]
        async with aclosing(self._conversations.turn(conversation, request, turn_id)) as chunks:
            async for chunk in chunks:
                answer.add(chunk)
        text = "".join(answer.text)
        if "\0" in text:
            raise NulInAnswer("the model's answer contains a NUL character")
        return text

    async def _create(self, asked: Asked) -> str:
        caller = caller_of(asked, self._directory)
        system = asked.payload.get("system")
        messages = [Message("system", system)] if system is not None else []
        made = await self._store.create(caller.tenant.id, _metadata(asked.payload.get("metadata")), messages)
        return made.id

    async def _fork(self, asked: Asked) -> str:
        caller = caller_of(asked, self._directory)
        made = await self._store.fork(caller.tenant.id, asked.payload["conversation"], asked.payload.get("item"), None)
        return made.id

    async def _delete(self, asked: Asked) -> str:
        caller: Caller = caller_of(asked, self._directory)
        await self._store.delete(caller.tenant.id, asked.payload["conversation"])
        return "true"

    async def _items(self, asked: Asked) -> str:
        caller = caller_of(asked, self._directory)
        items = await self._store.items(
            caller.tenant.id, asked.payload["conversation"], None, ITEMS_TOLD_MAX, is_ascending=True
        )
        rows = [
            {
                "position": item.position,
                "id": item.id,
                "role": item.message.role,
                "content": item.message.content,
                "created_at": item.created_at,
            }
            for item in items
        ]
        return json.dumps(rows, default=str)


def _options(given: Any) -> dict[str, Any]:
    """Raises InvalidRequest."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            "infer_chat() options must be a JSON object", hint="""'{"max_tokens": 20}'""", param="options"
        )
    for name in given:
        if name in _NOT_HERE or name not in OPTIONS:
            known = ", ".join(sorted(OPTIONS - _NOT_HERE))
            raise InvalidRequest(
                f"infer_chat: unknown option {name[:64]}", hint=f"Options are {known}.", param=name[:64]
            )
    return checked_options(given)


def _metadata(given: Any) -> dict[str, str]:
    """Raises InvalidRequest."""
    if not isinstance(given, Mapping) or not all(isinstance(value, str) for value in given.values()):
        raise InvalidRequest("metadata must be a JSON object whose values are strings", param="metadata")
    return dict(given)
