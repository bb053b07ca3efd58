"""The fields that hold an answer to a form: `response_format` in OpenAI's words, `structured_outputs` in vLLM's. Protocol code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dbnode.generate import StructuredOutputs
from dbnode.rest.fields import Schema, check_names
from stratakv.errors import InvalidRequest

FORM_CHOICES_MAX = 1000
FORM_CHARS_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    @property
    def schema(self) -> Schema:
        plain = {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
            "additionalProperties": False,
        }
        described = {
            "name": {"type": ["string", "null"]},
            "description": {"type": ["string", "null"]},
            "strict": {"type": ["boolean", "null"]},
            "schema": {"type": "object"},
        }
        inner = {"type": "object", "properties": described, "required": ["schema"], "additionalProperties": False}
        held = {
            "type": "object",
            "properties": {"type": {"const": "json_schema"}, "json_schema": inner},
            "required": ["type", "json_schema"],
            "additionalProperties": False,
        }
        return {"anyOf": [plain, held]}

    def read(self, name: str, value: Any) -> StructuredOutputs | None:
        """The form of the answer, in OpenAI's words."""
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in ("text", "json_object", "json_schema"):
            raise InvalidRequest(f"{name}.type: expected text, json_object or json_schema", param=f"{name}.type")
        check_names(name, value, frozenset(("type", "json_schema") if kind == "json_schema" else ("type",)))
        if kind == "json_schema":
            return StructuredOutputs(json=_json_schema(f"{name}.json_schema", value.get("json_schema")))
        return StructuredOutputs(json={"type": "object"}) if kind == "json_object" else None


@dataclass(frozen=True, slots=True)
class GivenForm:
    """The form of the answer in vLLM's words; exactly one is given."""

    @property
    def schema(self) -> Schema:
        texts = {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "minItems": 1,
            "maxItems": FORM_CHOICES_MAX,
        }
        kinds: Schema = {
            "json": {"type": "object"},
            "choice": texts,
            "regex": {"type": "string", "minLength": 1, "maxLength": FORM_CHARS_MAX},
        }
        return {
            "anyOf": [
                {"type": "object", "properties": {kind: form}, "required": [kind], "additionalProperties": False}
                for kind, form in kinds.items()
            ]
        }

    def read(self, name: str, value: Any) -> StructuredOutputs:
        kinds = frozenset(("json", "choice", "regex"))
        if not isinstance(value, dict):
            raise InvalidRequest(f"{name}: expected an object with json, choice or regex", param=name)
        given = {kind: form for kind, form in value.items() if form is not None}
        check_names(name, given, kinds)
        if len(given) != 1:
            raise InvalidRequest(f"{name}: expected one of json, choice and regex", param=name)
        [(kind, form)] = given.items()
        _check_form(f"{name}.{kind}", kind, form)
        return StructuredOutputs(**given)


def _check_form(place: str, kind: str, form: Any) -> None:
    if kind == "json" and not isinstance(form, dict):
        raise InvalidRequest(f"{place}: expected a JSON schema as an object", param=place)
    if kind == "regex" and not (isinstance(form, str) and 0 < len(form) <= FORM_CHARS_MAX):
        raise InvalidRequest(f"{place}: expected 1 to {FORM_CHARS_MAX} characters", param=place)
    is_list = isinstance(form, list) and 0 < len(form) <= FORM_CHOICES_MAX
    if kind == "choice" and not (is_list and all(isinstance(text, str) and text for text in form)):
        raise InvalidRequest(f"{place}: expected 1 to {FORM_CHOICES_MAX} strings, none of them empty", param=place)


def _json_schema(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{place}: expected an object", param=place)
    check_names(place, value, frozenset(("name", "description", "schema", "strict")))
    for name in ("name", "description"):  # OpenAI shows them to the model; here they do nothing
        if not isinstance(value.get(name, ""), str | None):
            raise InvalidRequest(f"{place}.{name}: expected a string", param=f"{place}.{name}")
    if not isinstance(value.get("strict"), bool | None):
        raise InvalidRequest(f"{place}.strict: expected true or false", param=f"{place}.strict")
    schema = value.get("schema")
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{place}.schema: expected an object", param=f"{place}.schema")
    return schema
