"""The fields that both completion endpoints share: how tokens are chosen, when to stop, what form the answer has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dbnode.generate import SloClass
from dbnode.rest.fields import Boolean, Field, Integer, Number, Schema, Text
from dbnode.rest.form_fields import GivenForm, ResponseFormat
from dbnode.rest.unsupported_fields import UNSUPPORTED
from stratakv.errors import InvalidRequest

STOPS_MAX = 16
STOP_CHARS_MAX = 1024
USER_CHARS_MAX = 512
CACHE_SALT_CHARS_MAX = 512
PRIORITY_MAX = 2**31 - 1
INTEGER_MAX = 2**63 - 1
CHOICES_MAX = 128
LOGPROBS_MAX = 20
PENALTY_MAX = 2.0
REPETITION_PENALTY_MAX = 100.0
BIASES_MAX = 1024
BIAS_MAX = 100.0
STOP_TOKENS_MAX = 128


@dataclass(frozen=True, slots=True)
class Stop:
    @property
    def schema(self) -> Schema:
        one = {"type": "string", "minLength": 1, "maxLength": STOP_CHARS_MAX}
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": STOPS_MAX}]}

    def read(self, name: str, value: Any) -> tuple[str, ...]:
        stops = [value] if isinstance(value, str) else value
        if (
            not isinstance(stops, list)
            or len(stops) > STOPS_MAX
            or not all(isinstance(s, str) and 0 < len(s) <= STOP_CHARS_MAX for s in stops)
        ):
            raise InvalidRequest(
                f"{name}: expected at most {STOPS_MAX} strings of 1 to {STOP_CHARS_MAX} characters", param=name
            )
        return tuple(stops)


@dataclass(frozen=True, slots=True)
class StopTokens:
    @property
    def schema(self) -> Schema:
        return {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": STOP_TOKENS_MAX}

    def read(self, name: str, value: Any) -> tuple[int, ...]:
        is_list = isinstance(value, list) and len(value) <= STOP_TOKENS_MAX
        if not is_list or not all(type(token) is int and token >= 0 for token in value):
            raise InvalidRequest(f"{name}: expected at most {STOP_TOKENS_MAX} token ids", param=name)
        return tuple(value)


@dataclass(frozen=True, slots=True)
class LogitBias:
    @property
    def schema(self) -> Schema:
        return {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -BIAS_MAX, "maximum": BIAS_MAX},
            "maxProperties": BIASES_MAX,
        }

    def read(self, name: str, value: Any) -> tuple[tuple[int, float], ...]:
        if not isinstance(value, dict) or len(value) > BIASES_MAX:
            raise InvalidRequest(f"{name}: expected an object of at most {BIASES_MAX} token ids", param=name)
        number = Number(-BIAS_MAX, BIAS_MAX)
        for token in value:
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise InvalidRequest(f"{name}: {token[:20]!r} is no token id", param=name)
        return tuple((int(token), number.read(name, bias)) for token, bias in value.items())


@dataclass(frozen=True, slots=True)
class StreamOptions:
    @property
    def schema(self) -> Schema:
        return {
            "type": "object",
            "properties": {
                "include_usage": {"type": ["boolean", "null"]},
                "include_obfuscation": {"enum": [False, None]},
            },
            "additionalProperties": False,
        }

    def read(self, name: str, value: Any) -> bool:
        """Whether usage is wanted."""
        if not isinstance(value, dict):
            raise InvalidRequest(f"{name}: expected an object", param=name)
        for inner in value.keys() - {"include_usage", "include_obfuscation"}:
            raise InvalidRequest(f"{name}.{inner[:64]}: unknown field", param=name)
        if value.get("include_obfuscation"):
            raise InvalidRequest(f"{name}.include_obfuscation: this value is not supported", param=name)
        include_usage = value.get("include_usage")
        return include_usage is not None and Boolean().read(f"{name}.include_usage", include_usage)


@dataclass(frozen=True, slots=True)
class Service:
    @property
    def schema(self) -> Schema:
        return {"enum": list(SloClass)}

    def read(self, name: str, value: Any) -> SloClass:
        if not isinstance(value, str) or value not in frozenset(SloClass):
            raise InvalidRequest(f"{name}: expected one of {', '.join(SloClass)}", param=name)
        return SloClass(value)


SAMPLING: dict[str, Field] = {
    "temperature": Number(0.0, 2.0),
    "top_p": Number(0.0, 1.0, above_low=True),
    "top_k": Integer(-1, INTEGER_MAX),
    "min_p": Number(0.0, 1.0),
    "seed": Integer(-INTEGER_MAX, INTEGER_MAX),
    "stop": Stop(),
    "ignore_eos": Boolean(),
    "stop_token_ids": StopTokens(),
    "min_tokens": Integer(0, INTEGER_MAX),
    "include_stop_str_in_output": Boolean(),
    "skip_special_tokens": Boolean(),
    "presence_penalty": Number(-PENALTY_MAX, PENALTY_MAX),
    "frequency_penalty": Number(-PENALTY_MAX, PENALTY_MAX),
    "repetition_penalty": Number(0.0, REPETITION_PENALTY_MAX, above_low=True),
    "logit_bias": LogitBias(),
}
"""Named as in `dbnode.generate.Sampling`."""

MODEL: Field = Text(USER_CHARS_MAX)
CACHE_SALT: Field = Text(CACHE_SALT_CHARS_MAX, chars_min=1)

SHARED: dict[str, Field] = {
    **SAMPLING,
    "model": MODEL,
    "max_tokens": Integer(1, INTEGER_MAX),
    "n": Integer(1, CHOICES_MAX),
    "response_format": ResponseFormat(),
    "structured_outputs": GivenForm(),
    "stream": Boolean(),
    "stream_options": StreamOptions(),
    "truncate_prompt_tokens": Integer(-1, INTEGER_MAX),
    "user": Text(USER_CHARS_MAX),
    "safety_identifier": Text(USER_CHARS_MAX),
    "priority": Integer(-PRIORITY_MAX, PRIORITY_MAX),
    "slo_class": Service(),
    "cache_salt": CACHE_SALT,
    **UNSUPPORTED,
}
