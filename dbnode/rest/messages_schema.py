"""The JSON schema of chat messages, as the OpenAPI document shows it; what checks them is `stratakv.chat_messages`."""

from __future__ import annotations

from typing import Any

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]}
_NAME = {"type": ["string", "null"]}
_CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "arguments": {"type": "string", "description": "A JSON object, as text."},
            },
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "type", "function"],
}


def _message(roles: list[str], required: list[str], **more: Any) -> dict[str, Any]:
    properties = {"role": {"enum": roles}, "content": _CONTENT, "name": _NAME, **more}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _message(["system", "developer", "user"], ["role", "content"]),
            _message(["assistant"], ["role", "content"], refusal={"type": ["string", "null"]}),
            _message(
                ["assistant"],
                ["role", "tool_calls"],
                content={"anyOf": [*_CONTENT["anyOf"], {"type": "null"}]},
                tool_calls={"type": "array", "items": _CALL, "minItems": 1},
                refusal={"type": ["string", "null"]},
            ),
            _message(["tool"], ["role", "content", "tool_call_id"], tool_call_id={"type": "string"}),
        ]
    },
}
