"""Fields of request bodies: each checks its value and knows the JSON schema that the OpenAPI document shows of it.

A table of fields says all that an endpoint takes. Protocol code: values in, values out. Raises InvalidRequest whose `param` is
the field.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from stratakv.errors import InvalidRequest

Schema = dict[str, Any]
_GZIP = b"\x1f\x8b"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
DEPTH_MAX = 100
"""Objects and lists in each other."""
NAME_CHARS_MAX = 64
"""So much of a name that is not known is repeated to the client."""


class Field(Protocol):
    """One field of a body. It is never asked about null, which says nothing."""

    @property
    def schema(self) -> Schema: ...

    def read(self, name: str, value: Any) -> Any:
        """What is meant. Raises InvalidRequest that names the field."""
        ...


Fields = Mapping[str, Field]


@dataclass(frozen=True, slots=True)
class Integer:
    low: int
    high: int

    @property
    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def read(self, name: str, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise InvalidRequest(f"{name}: expected an integer from {self.low} to {self.high}", param=name)
        return value


@dataclass(frozen=True, slots=True)
class Number:
    low: float
    high: float
    above_low: bool = False
    """The least value is not allowed itself."""

    @property
    def schema(self) -> Schema:
        return {"type": "number", "exclusiveMinimum" if self.above_low else "minimum": self.low, "maximum": self.high}

    def read(self, name: str, value: Any) -> float:
        fits = not isinstance(value, bool) and isinstance(value, int | float) and self.low <= value <= self.high
        if not fits or (self.above_low and value == self.low):
            low = f"above {self.low:g}" if self.above_low else f"from {self.low:g}"
            raise InvalidRequest(f"{name}: expected a number {low} to {self.high:g}", param=name)
        return float(value)


@dataclass(frozen=True, slots=True)
class Boolean:
    @property
    def schema(self) -> Schema:
        return {"type": "boolean"}

    def read(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name}: expected true or false", param=name)
        return value


@dataclass(frozen=True, slots=True)
class Text:
    chars_max: int
    chars_min: int = 0

    @property
    def schema(self) -> Schema:
        return {"type": "string", "minLength": self.chars_min, "maxLength": self.chars_max}

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not self.chars_min <= len(value) <= self.chars_max:
            raise InvalidRequest(
                f"{name}: expected a string of {self.chars_min} to {self.chars_max} characters", param=name
            )
        return value


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A field that is known and does nothing here: only values that ask for nothing are taken."""

    neutral: tuple[Any, ...]
    hint: str | None = None

    @property
    def schema(self) -> Schema:
        description = f"Not supported: any other value is refused. {self.hint or ''}".rstrip()
        return {"enum": list(self.neutral), "description": description}

    def read(self, name: str, value: Any) -> None:
        # 0 and 0.0 are the same to JSON; false is something else.
        if not any(isinstance(value, bool) == isinstance(n, bool) and value == n for n in self.neutral):
            what = "this value is not supported" if self.neutral else "not supported"
            raise InvalidRequest(f"{name}: {what}", hint=self.hint, param=name)


def read_fields(body: bytes, fields: Fields) -> dict[str, Any]:
    """What a body says, by name. Null and what is not supported are left out."""
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(body, error) from None
    if not isinstance(given, dict):
        raise InvalidRequest("the body must be a JSON object")
    if body.count(b"[") + body.count(b"{") > DEPTH_MAX:
        _check_depth(given)
    found: dict[str, Any] = {}
    for name, value in given.items():
        field = fields.get(name)
        if field is None:
            raise _unknown(name, fields)
        if value is not None:
            meant = field.read(name, value)
            if meant is not None:
                found[name] = meant
    return found


def _unknown(name: str, fields: Fields) -> InvalidRequest:
    """With the field that may have been meant."""
    shown = name[:NAME_CHARS_MAX]
    near = difflib.get_close_matches(shown, fields, n=1, cutoff=0.8)
    hint = f"Did you mean {near[0]}?" if near else None
    return InvalidRequest(f"{shown}: unknown field", hint=hint, param=shown)


def _not_json(body: bytes, error: Exception) -> InvalidRequest:
    """Says more than the decoder where more is known."""
    if not body:
        return InvalidRequest("the request has no body")
    if body.startswith(_GZIP):
        return InvalidRequest("the body is compressed", hint="Send it as it is, without Content-Encoding.")
    if isinstance(error, RecursionError):
        return InvalidRequest(f"the body is nested deeper than {DEPTH_MAX} levels")
    if isinstance(error, UnicodeDecodeError):
        return InvalidRequest("the body is not UTF-8")
    hint = "It has an escape of half a surrogate pair, maybe." if _SURROGATE.search(body) else None
    return InvalidRequest(f"the body is not valid JSON: {error}", hint=hint)


def _check_depth(given: dict[str, Any]) -> None:
    """Raises InvalidRequest. What is nested deeper is no request, and some who walk through it cannot."""
    for name, value in given.items():
        level = [value]
        for _ in range(DEPTH_MAX):
            inner = [part for part in level if isinstance(part, dict | list)]
            if not inner:
                break
            level = [part for one in inner for part in (one.values() if isinstance(one, dict) else one)]
        else:
            shown = name[:NAME_CHARS_MAX]
            raise InvalidRequest(f"{shown}: nested deeper than {DEPTH_MAX} levels", param=shown)


def check_names(place: str, value: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse what an inner object must not have. Raises InvalidRequest."""
    for name in value.keys() - known:
        shown = f"{place}.{name[:NAME_CHARS_MAX]}"
        raise InvalidRequest(f"{shown}: unknown field", param=shown)


def object_schema(fields: Fields, required: tuple[str, ...] = ()) -> Schema:
    """The JSON schema of a body with these fields."""
    properties = {
        name: _or_null(field.schema) if name not in required else field.schema for name, field in fields.items()
    }
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _or_null(schema: Schema) -> Schema:
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return schema | {"type": [schema["type"], "null"]}
    if "enum" in schema:
        return schema | {"enum": [*schema["enum"], None]}
    return {"anyOf": [schema, {"type": "null"}]}
