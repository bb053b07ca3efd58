"""/v1/conversations: create, read, change, fork, delete, list; add items; and take a turn, whole or streamed.

Shaped after OpenAI's Conversations API where that has the like; the turn is answered as a chat completion.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dbnode.conversations.service import Conversations, checked_messages
from dbnode.conversations.values import Conversation, Item, Message
from dbnode.generate import GenerateRequest
from dbnode.rest.choices import Generate
from dbnode.rest.completions import Completions
from dbnode.rest.door import caller_of
from dbnode.rest.fields import Field, Integer, Schema, Text, read_fields
from dbnode.rest.form import Form
from dbnode.rest.http import error_response
from dbnode.rest.parse import Asked, Parsed, parse_turn
from dbnode.rest.sampling_fields import INTEGER_MAX
from stratakv.errors import InvalidRequest, StrataError
from stratakv.http_body import read_body

ITEMS_MAX = 20
"""Added at once, as OpenAI has it."""
LIST_MAX = 100
LIST_DEFAULT = 20
METADATA_MAX = 16
METADATA_KEY_CHARS_MAX = 64
METADATA_CHARS_MAX = 512
_ID_CHARS_MAX = 128


class Metadata:
    """Up to 16 texts by name."""

    schema: Schema = {  # noqa: RUF012
        "type": "object",
        "maxProperties": METADATA_MAX,
        "propertyNames": {"maxLength": METADATA_KEY_CHARS_MAX},
        "additionalProperties": {"type": "string", "maxLength": METADATA_CHARS_MAX},
    }

    def read(self, name: str, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or len(value) > METADATA_MAX:
            raise InvalidRequest(f"{name}: expected an object of at most {METADATA_MAX} texts", param=name)
        for key, text in value.items():
            if len(key) > METADATA_KEY_CHARS_MAX or not isinstance(text, str) or len(text) > METADATA_CHARS_MAX:
                raise InvalidRequest(
                    f"{name}: expected names of at most {METADATA_KEY_CHARS_MAX} characters and texts of at most"
                    f" {METADATA_CHARS_MAX}",
                    param=name,
                )
            if "\0" in key + text:
                raise InvalidRequest(f"{name}: must not contain a NUL character", param=name)
        return value


class Items:
    """Messages to add without an answer."""

    schema: Schema = {  # noqa: RUF012
        "type": "array",
        "maxItems": ITEMS_MAX,
        "items": {
            "type": "object",
            "properties": {
                "type": {"const": "message"},
                "role": {"enum": ["system", "developer", "user", "assistant"]},
                "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
            },
            "required": ["role", "content"],
            "additionalProperties": False,
        },
    }

    def read(self, name: str, value: Any) -> list[Message]:
        if not isinstance(value, list) or len(value) > ITEMS_MAX:
            raise InvalidRequest(f"{name}: expected a list of at most {ITEMS_MAX} messages", param=name)
        plain = []
        for place, item in enumerate(value):
            if isinstance(item, dict) and item.get("type", "message") != "message":
                raise InvalidRequest(f"{name}[{place}].type: only message is supported", param=f"{name}[{place}].type")
            plain.append({k: v for k, v in item.items() if k != "type"} if isinstance(item, dict) else item)
        return checked_messages(tuple(plain), name)


CREATE: dict[str, Field] = {"items": Items(), "metadata": Metadata()}
UPDATE: dict[str, Field] = {"metadata": Metadata()}
ADD: dict[str, Field] = {"items": Items(), "version": Integer(0, INTEGER_MAX)}
FORK: dict[str, Field] = {"item_id": Text(_ID_CHARS_MAX, 1), "metadata": Metadata()}


class ConversationRoutes:
    """Puts the endpoints into an application."""

    def __init__(self, conversations: Conversations, completions: Completions, body_bytes_max: int) -> None:
        self._conversations = conversations
        self._store = conversations.store
        self._completions = completions
        self._body_bytes_max = body_bytes_max

    def add_to(self, app: FastAPI) -> None:
        base, one = "/v1/conversations", "/v1/conversations/{conversation_id}"
        app.add_api_route(base, self._create, methods=["POST"])
        app.add_api_route(base, self._list, methods=["GET"])
        app.add_api_route(one, self._get, methods=["GET"])
        app.add_api_route(one, self._update, methods=["POST"])
        app.add_api_route(one, self._delete, methods=["DELETE"])
        app.add_api_route(f"{one}/fork", self._fork, methods=["POST"])
        app.add_api_route(f"{one}/items", self._add, methods=["POST"])
        app.add_api_route(f"{one}/items", self._items, methods=["GET"])
        app.add_api_route(f"{one}/items/{{item_id}}", self._item, methods=["GET"])
        app.router.routes.append(
            Route(f"{one}/messages", TurnEndpoint(self._conversations, self._completions), methods=["POST"])
        )

    async def _create(self, request: Request) -> dict[str, Any]:
        given = await self._read(request, CREATE, may_be_empty=True)
        made = await self._store.create(_tenant(request), given.get("metadata", {}), given.get("items", ()))
        return conversation_object(made)

    async def _list(self, request: Request) -> dict[str, Any]:
        after, limit, _ = _page(request, ("after", "limit"))
        found = await self._store.newest(_tenant(request), after, limit + 1)
        return _listed([conversation_object(one) for one in found], limit)

    async def _get(self, request: Request, conversation_id: str) -> dict[str, Any]:
        return conversation_object(await self._store.get(_tenant(request), conversation_id))

    async def _update(self, request: Request, conversation_id: str) -> dict[str, Any]:
        given = await self._read(request, UPDATE)
        if "metadata" not in given:
            raise InvalidRequest("metadata: what is to be changed", param="metadata")
        changed = await self._store.change_metadata(_tenant(request), conversation_id, given["metadata"])
        return conversation_object(changed)

    async def _delete(self, request: Request, conversation_id: str) -> dict[str, Any]:
        await self._store.delete(_tenant(request), conversation_id)
        return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}

    async def _fork(self, request: Request, conversation_id: str) -> dict[str, Any]:
        given = await self._read(request, FORK, may_be_empty=True)
        made = await self._store.fork(_tenant(request), conversation_id, given.get("item_id"), given.get("metadata"))
        return conversation_object(made)

    async def _add(self, request: Request, conversation_id: str) -> dict[str, Any]:
        given = await self._read(request, ADD)
        if not given.get("items"):
            raise InvalidRequest("items: expected at least one message", param="items")
        _, items = await self._store.add(_tenant(request), conversation_id, given["items"], given.get("version"))
        return _listed([item_object(item) for item in items], len(items))

    async def _items(self, request: Request, conversation_id: str) -> dict[str, Any]:
        after, limit, order = _page(request, ("after", "limit", "order"))
        found = await self._store.items(
            _tenant(request), conversation_id, after, limit + 1, is_ascending=order == "asc"
        )
        return _listed([item_object(item) for item in found], limit)

    async def _item(self, request: Request, conversation_id: str, item_id: str) -> dict[str, Any]:
        return item_object(await self._store.item(_tenant(request), conversation_id, item_id))

    async def _read(self, request: Request, fields: dict[str, Field], *, may_be_empty: bool = False) -> dict[str, Any]:
        body = await read_body(request, self._body_bytes_max)
        return read_fields(body or b"{}" if may_be_empty else body, fields)


class TurnEndpoint:
    """POST /v1/conversations/ID/messages, as a plain ASGI application."""

    def __init__(self, conversations: Conversations, completions: Completions) -> None:
        self._conversations = conversations
        self._completions = completions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        version: int | None = None

        def parse(body: bytes, asked: Asked) -> Parsed:
            nonlocal version
            parsed, version = parse_turn(body, asked)
            checked_messages(parsed.request.messages or ())
            return parsed

        def generate(request: GenerateRequest) -> Any:
            return self._conversations.turn(
                scope["path_params"]["conversation_id"], request, request.request_id, version
            )

        made: Generate = generate
        try:
            await self._completions.serve(Form.CHAT, parse, scope, receive, send, made)
        except StrataError as error:
            await error_response(error)(scope, receive, send)


def conversation_object(conversation: Conversation) -> dict[str, Any]:
    """OpenAI's, with what else is known beside it."""
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": int(conversation.created_at.timestamp()),
        "metadata": dict(conversation.metadata),
        "stratakv": {
            "version": conversation.version,
            "items": conversation.num_items,
            "expires_at": int(conversation.expires_at.timestamp()),
            "forked_from": conversation.forked_from,
        },
    }


def item_object(item: Item) -> dict[str, Any]:
    message = item.message
    is_answer = message.role == "assistant"
    part: dict[str, Any] = {"type": "output_text" if is_answer else "input_text", "text": message.content}
    return {
        "type": "message",
        "id": item.id,
        "status": "completed",
        "role": message.role,
        "content": [part | ({"annotations": []} if is_answer else {})],
    }


def _listed(data: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    shown = data[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(data) > limit,
    }


def _tenant(request: Request) -> int:
    return caller_of(request).tenant.id


def _page(request: Request, known: tuple[str, ...]) -> tuple[str | None, int, str]:
    """What part of a list is wanted. Raises InvalidRequest."""
    given = request.query_params
    for name in given.keys() - set(known):
        raise InvalidRequest(f"{name[:64]}: unknown parameter", param=name[:64])
    limit, order = given.get("limit", str(LIST_DEFAULT)), given.get("order", "desc")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 5 and 1 <= int(limit) <= LIST_MAX):
        raise InvalidRequest(f"limit: expected an integer from 1 to {LIST_MAX}", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order: expected asc or desc", param="order")
    after = given.get("after")
    if after is not None and "\0" in after:
        raise InvalidRequest("after: must not contain a NUL character", param="after")
    return after, int(limit), order
