"""Which functions the model may call, whether it must, and what form its answer then has. Protocol code.

A call that is required, or of one named function, is held to that function's schema; one that the model makes by itself is found
in its text (`dbnode.rest.tool_calls`).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbnode.generate import StructuredOutputs
from dbnode.rest.fields import Schema, check_names
from stratakv.errors import InvalidRequest

TOOLS_MAX = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NAME_SCHEMA: Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"}
_NAMED = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": _NAME_SCHEMA},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}


class ToolMode(enum.StrEnum):
    """Who decides on a call."""

    NONE = "none"
    AUTO = "auto"
    """The model."""
    REQUIRED = "required"
    """There must be one."""
    NAMED = "named"
    """There must be one of a certain function."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How an answer may call tools."""

    mode: ToolMode
    functions: tuple[Mapping[str, Any], ...]
    """Those that may be called; of NAMED, one."""
    is_parallel: bool = True
    """More than one call in an answer."""

    def form(self) -> StructuredOutputs | None:
        """What the answer is held to. Raises InvalidRequest."""
        if self.mode is ToolMode.NAMED:
            return StructuredOutputs(json=_arguments_schema(self.functions[0]))
        if self.mode is not ToolMode.REQUIRED:
            return None
        definitions: dict[str, Any] = {}
        calls = [_call_schema(function, definitions) for function in self.functions]
        schema: Schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1} | definitions
        return StructuredOutputs(json=schema if self.is_parallel else schema | {"maxItems": 1})


class Tools:
    """The field `tools`."""

    @property
    def schema(self) -> Schema:
        function = {
            "type": "object",
            "properties": {
                "name": _NAME_SCHEMA,
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"]},
                "strict": {"type": ["boolean", "null"]},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
        tool = {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": function},
            "required": ["type", "function"],
            "additionalProperties": False,
        }
        return {"type": "array", "items": tool, "maxItems": TOOLS_MAX}

    def read(self, name: str, value: Any) -> tuple[Mapping[str, Any], ...]:
        """As the model is told."""
        if not isinstance(value, list) or len(value) > TOOLS_MAX:
            raise InvalidRequest(f"{name}: expected a list of at most {TOOLS_MAX} functions", param=name)
        tools = tuple(_tool(f"{name}[{index}]", tool, name) for index, tool in enumerate(value))
        names = [tool["function"]["name"] for tool in tools]
        if len(set(names)) < len(names):
            raise InvalidRequest(f"{name}: two functions have the same name", param=name)
        return tools


class ToolChoice:
    """The field `tool_choice`: a mode, or the name of a function."""

    @property
    def schema(self) -> Schema:
        return {"anyOf": [{"enum": [ToolMode.NONE, ToolMode.AUTO, ToolMode.REQUIRED]}, _NAMED]}

    def read(self, name: str, value: Any) -> tuple[ToolMode, str | None]:
        if isinstance(value, str) and value in (ToolMode.NONE, ToolMode.AUTO, ToolMode.REQUIRED):
            return ToolMode(value), None
        function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(f"{name}: expected none, auto, required or a function's name", param=name)
        check_names(name, value, frozenset(("type", "function")))
        check_names(f"{name}.function", function, frozenset(("name",)))
        return ToolMode.NAMED, function["name"]


def tool_use(given: Mapping[str, Any]) -> ToolUse | None:
    """What the fields of a chat ask for together; None if nothing may be called. Raises InvalidRequest."""
    tools: tuple[Mapping[str, Any], ...] = given.get("tools", ())
    mode, name = given.get("tool_choice", (ToolMode.AUTO if tools else ToolMode.NONE, None))
    if mode is ToolMode.NONE:
        return None
    if not tools:
        raise InvalidRequest("tool_choice: only with tools", param="tool_choice")
    functions = tuple(tool["function"] for tool in tools)
    if name is not None:
        functions = tuple(function for function in functions if function["name"] == name)
        if not functions:
            raise InvalidRequest(f"tool_choice: there is no function {name[:64]!r} among tools", param="tool_choice")
    return ToolUse(mode, functions, given.get("parallel_tool_calls", True))


def _tool(place: str, value: Any, field: str) -> Mapping[str, Any]:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict):
        raise InvalidRequest(f'{place}: expected {{"type": "function", "function": …}}', param=field)
    check_names(place, value, frozenset(("type", "function")))
    check_names(f"{place}.function", function, frozenset(("name", "description", "parameters", "strict")))
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(f"{place}.function.name: expected 1 to 64 of a-z, A-Z, 0-9, '_', '-' and '.'", param=field)
    for inner, kind in (("description", str), ("parameters", dict), ("strict", bool)):
        if not isinstance(function.get(inner), kind | None):
            raise InvalidRequest(f"{place}.function.{inner}: expected another type", param=field)
    told = {
        inner: function[inner] for inner in ("name", "description", "parameters") if function.get(inner) is not None
    }
    return {"type": "function", "function": told}


def _arguments_schema(function: Mapping[str, Any]) -> Schema:
    schema: Schema = function.get("parameters") or {"type": "object", "properties": {}}
    return schema


def _call_schema(function: Mapping[str, Any], definitions: dict[str, Any]) -> Schema:
    """One call; definitions that its arguments refer to are moved to where references look for them."""
    arguments = dict(_arguments_schema(function))
    for place in ("$defs", "definitions"):
        defined = arguments.pop(place, None) or {}
        if not isinstance(defined, dict):
            raise InvalidRequest(f"tools: {place} of {function['name']}: expected an object", param="tools")
        for name, schema in defined.items():
            known = definitions.setdefault(place, {})
            if known.setdefault(name, schema) != schema:
                raise InvalidRequest(f"tools: two functions define {name[:64]!r} differently", param="tools")
    properties = {"name": {"const": function["name"]}, "arguments": arguments}
    return _closed(properties, ("name", "arguments"))


def _closed(properties: Schema, required: Sequence[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
