"""The endpoints of conversations in the OpenAPI document, and schemas of what they answer."""

from __future__ import annotations

from dbnode.rest.answer_schemas import Schema, closed, listed, named, or_null
from dbnode.rest.conversations import ADD, CREATE, FORK, LIST_DEFAULT, LIST_MAX, UPDATE
from dbnode.rest.fields import object_schema
from dbnode.rest.operation import GENERATED, WITH_BODY, Operation
from dbnode.rest.parse import TURN

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_ROLE: Schema = {"enum": ["system", "developer", "user", "assistant"]}
_BASE, _ONE = "/v1/conversations", "/v1/conversations/{conversation_id}"


def _list_of(name: str) -> Schema:
    ends = {"first_id": or_null(_TEXT), "last_id": or_null(_TEXT), "has_more": {"type": "boolean"}}
    return closed({"object": {"const": "list"}, "data": listed(named(name)), **ends})


CONVERSATION_SCHEMAS: Schema = {
    "Conversation": closed(
        {
            "id": _TEXT,
            "object": {"const": "conversation"},
            "created_at": _COUNT,
            "metadata": {"type": "object", "additionalProperties": _TEXT},
            "stratakv": closed(
                {"version": _COUNT, "items": _COUNT, "expires_at": _COUNT, "forked_from": or_null(_TEXT)}
            ),
        }
    ),
    "ConversationItem": closed(
        {
            "type": {"const": "message"},
            "id": _TEXT,
            "status": {"const": "completed"},
            "role": _ROLE,
            "content": listed(
                closed(
                    {"type": {"enum": ["input_text", "output_text"]}, "text": _TEXT, "annotations": listed({})},
                    "annotations",
                )
            ),
        }
    ),
    "ConversationDeleted": closed(
        {"id": _TEXT, "object": {"const": "conversation.deleted"}, "deleted": {"const": True}}
    ),
    "Conversations": _list_of("Conversation"),
    "ConversationItems": _list_of("ConversationItem"),
}


def _query(name: str, schema: Schema) -> Schema:
    return {"in": "query", "name": name, "required": False, "schema": schema}


_AFTER = _query("after", {"type": "string", "pattern": "^[^\\x00]*$"})
_LIMIT = _query("limit", {"type": "integer", "minimum": 1, "maximum": LIST_MAX, "default": LIST_DEFAULT})
_ORDER = _query("order", {"enum": ["asc", "desc"]})
_ID = {"in": "path", "name": "conversation_id", "required": True, "schema": _TEXT}

CONVERSATION_OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", _BASE): Operation(
        "A new conversation", "Conversation", object_schema(CREATE), body_is_optional=True, errors=WITH_BODY
    ),
    ("get", _BASE): Operation("Conversations", "Conversations", errors=(400,), parameters=(_AFTER, _LIMIT)),
    ("get", _ONE): Operation("One conversation", "Conversation", errors=(404,)),
    ("post", _ONE): Operation(
        "Change its metadata", "Conversation", object_schema(UPDATE, ("metadata",)), errors=WITH_BODY
    ),
    ("delete", _ONE): Operation("Delete it", "ConversationDeleted", errors=(404,)),
    ("post", f"{_ONE}/fork"): Operation(
        "Another one that begins alike", "Conversation", object_schema(FORK), body_is_optional=True, errors=WITH_BODY
    ),
    ("post", f"{_ONE}/items"): Operation(
        "Add messages", "ConversationItems", object_schema(ADD, ("items",)), errors=(*WITH_BODY, 409)
    ),
    ("get", f"{_ONE}/items"): Operation(
        "Its messages", "ConversationItems", errors=(400, 404), parameters=(_AFTER, _LIMIT, _ORDER)
    ),
    ("get", f"{_ONE}/items/{{item_id}}"): Operation("One message", "ConversationItem", errors=(404,)),
    ("post", f"{_ONE}/messages"): Operation(
        "Add messages, and the model's answer to them",
        "ChatCompletion",
        object_schema(TURN, ("messages",)),
        event="ChatCompletionEvent",
        errors=(*GENERATED, 409),
        parameters=(_ID,),
    ),
}
