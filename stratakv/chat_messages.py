"""Chat messages of OpenAI's form, checked, as chat templates want them; with calls of tools and their results.

Used by `stratakv.text` when it writes a conversation. A template that knows nothing of tools is given the same in words: what may
be called stands in the system message, and calls and results in tags, the way many small models have learned it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stratakv.errors import InvalidRequest

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles of chat messages → what the template calls them."""
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
_RESULT_BEGIN, _RESULT_END = "<tool_response>", "</tool_response>"
_FIELDS = {"role", "content", "name"}
_OWN_FIELDS = {"assistant": {"tool_calls", "refusal"}, "tool": {"tool_call_id"}}
_TOOLS_TEXT = (
    "You can call functions. Here are their signatures:\n<tools>\n{tools}\n</tools>\n"
    'To call one, write {begin}\n{{"name": <its name>, "arguments": <an object with its arguments>}}\n{end}'
)


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages with a known role, text and calls, and nothing else. Raises InvalidRequest that names the field."""
    if not messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    return [_plain_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def in_words(messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for a template that knows no tools, calls and results."""
    worded = [_worded(message) for message in messages]
    if not tools:
        return worded
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _TOOLS_TEXT.format(tools=signatures, begin=CALL_BEGIN, end=CALL_END)
    if worded[0]["role"] == "system":
        return [{"role": "system", "content": f"{worded[0]['content']}\n\n{text}"}, *worded[1:]]
    return [{"role": "system", "content": text}, *worded]


def _worded(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"{_RESULT_BEGIN}\n{message['content']}\n{_RESULT_END}"}
    calls = [
        f"{CALL_BEGIN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CALL_END}"
        for call in message.get("tool_calls", ())
    ]
    content = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {"role": message["role"], "content": content}


def _plain_message(place: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{place} must be an object", param=place)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise InvalidRequest(f"{place}.role must be one of {known}", param=f"{place}.role")
    known_fields = _FIELDS | _OWN_FIELDS.get(role, set())
    unknown = [str(key) for key in message if key not in known_fields and message[key] is not None]
    if unknown:
        raise InvalidRequest(f"{place}.{unknown[0]} is not supported", param=f"{place}.{unknown[0]}")
    for key in ("name", "refusal"):
        if not isinstance(message.get(key), str | None):
            raise InvalidRequest(f"{place}.{key} must be a string", param=f"{place}.{key}")
    plain: dict[str, Any] = {"role": ROLES[role]}
    calls = message.get("tool_calls")
    if calls:
        plain["tool_calls"] = _calls(f"{place}.tool_calls", calls)
    content = message.get("content")
    plain["content"] = "" if calls and content is None else _plain_content(f"{place}.content", content)
    if role == "tool":
        if not isinstance(message.get("tool_call_id"), str):
            raise InvalidRequest(f"{place}.tool_call_id must be a string", param=f"{place}.tool_call_id")
        plain["tool_call_id"] = message["tool_call_id"]
    return plain


def _plain_content(place: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{place} must be a string or a list of text parts", param=place)
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{place}[{index}] must be a text part", param=f"{place}[{index}]")
        parts.append(part["text"])
    return "".join(parts)


def _calls(place: str, calls: Any) -> list[dict[str, Any]]:
    """Calls that the assistant made; templates want the arguments as an object, OpenAI has them as text."""
    if not isinstance(calls, list):
        raise InvalidRequest(f"{place} must be a list", param=place)
    return [_call(f"{place}[{index}]", call) for index, call in enumerate(calls)]


def _call(place: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise InvalidRequest(f"{place} must be a call of a function", param=place)
    name, text = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not isinstance(text, str):
        raise InvalidRequest(f"{place}.function must have a name and arguments as text", param=f"{place}.function")
    try:
        arguments = msgspec.json.decode(text) if text else {}
    except (ValueError, RecursionError):  # of msgspec too, which takes no half of a surrogate pair
        arguments = None
    if not isinstance(arguments, dict):
        field = f"{place}.function.arguments"
        raise InvalidRequest(f"{field} must be a JSON object, written as a string", param=field)
    return {"id": str(call.get("id") or ""), "type": "function", "function": {"name": name, "arguments": arguments}}
