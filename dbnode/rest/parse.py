"""OpenAI request bodies → `GenerateRequest`s. Strict: a field or value that is not supported is refused by name, never ignored.

Protocol code: bytes in, values out. Raises InvalidRequest whose `param` is the field.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from dbnode.generate import GenerateRequest, Sampling, SloClass, Source, StructuredOutputs
from stratakv.errors import InvalidRequest

STOPS_MAX = 16
STOP_CHARS_MAX = 1024
USER_CHARS_MAX = 512
CACHE_SALT_CHARS_MAX = 512
PRIORITY_MAX = 2**31 - 1
COMPLETION_MAX_TOKENS_DEFAULT = 16
"""OpenAI's default for /v1/completions; a chat answer is as long as the context allows."""
SEED_MAX = 2**63 - 1
PIN_S_MAX = 30 * 24 * 3600.0

_Fields = Mapping[str, Any]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
}
"""Fields that are not supported, with the values that ask for nothing; null always does."""

_SHARED = frozenset(
    (
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "response_format",
        "stream",
        "stream_options",
        "user",
        "priority",
        "slo_class",
        "cache_salt",
    )
)
_CHAT = _SHARED | {"messages", "max_completion_tokens", "ignore_eos"}
_COMPLETION = _SHARED | {"prompt", "ignore_eos"}
_PIN = frozenset(("messages", "prompt", "model", "cache_salt", "seconds"))


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request and the form its answer is to have."""

    request: GenerateRequest
    stream: bool
    include_usage: bool


def parse_chat(body: bytes, request_id: str, trace_id: str) -> Parsed:
    """POST /v1/chat/completions."""
    fields = _fields(body, _CHAT)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages: expected a list with at least one message", param="messages")
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    return _parsed(fields, request_id, trace_id, _integer(fields, name, None, 1, SEED_MAX), messages=tuple(messages))


def parse_completion(body: bytes, request_id: str, trace_id: str) -> Parsed:
    """POST /v1/completions."""
    fields = _fields(body, _COMPLETION)
    max_tokens = _integer(fields, "max_tokens", COMPLETION_MAX_TOKENS_DEFAULT, 1, SEED_MAX)
    return _parsed(fields, request_id, trace_id, max_tokens, prompt=_prompt(fields.get("prompt")))


def parse_pin(body: bytes) -> tuple[GenerateRequest, float]:
    """POST /v1/stratakv/pin: whose prompt is to be kept, and for how many seconds."""
    fields = _fields(body, _PIN)
    messages = fields.get("messages")
    if isinstance(messages, list) and messages and "prompt" not in fields:
        content: dict[str, Any] = {"messages": tuple(messages)}
    elif messages is None:
        content = {"prompt": _prompt(fields.get("prompt"))}
    else:
        raise InvalidRequest("messages: expected a list with at least one message, and no prompt", param="messages")
    if "seconds" not in fields:
        raise InvalidRequest("seconds: how long the prompt is to be kept", param="seconds")
    request = GenerateRequest(
        request_id="",
        source=Source.REST,
        arrived_s=time.monotonic(),
        model=_string(fields, "model", USER_CHARS_MAX),
        cache_salt=_salt(fields),
        **content,
    )
    return request, _number(fields, "seconds", 0.0, 1.0, PIN_S_MAX)


def _parsed(fields: _Fields, request_id: str, trace_id: str, max_tokens: int | None, **content: Any) -> Parsed:
    stream = _boolean(fields, "stream")
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=_number(fields, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(fields, "top_p", 1.0, 0.0, 1.0),
        top_k=max(0, _integer(fields, "top_k", 0, -1, SEED_MAX) or 0),
        min_p=_number(fields, "min_p", 0.0, 0.0, 1.0),
        seed=_integer(fields, "seed", None, -SEED_MAX, SEED_MAX),
        stop=_stop(fields.get("stop")),
        ignore_eos=_boolean(fields, "ignore_eos"),
        structured_outputs=_response_format(fields.get("response_format")),
    )
    _string(fields, "user", USER_CHARS_MAX)
    request = GenerateRequest(
        request_id=request_id,
        source=Source.REST,
        arrived_s=time.monotonic(),
        model=_string(fields, "model", USER_CHARS_MAX),
        sampling=sampling,
        priority=_integer(fields, "priority", 0, -PRIORITY_MAX, PRIORITY_MAX) or 0,
        slo_class=_slo_class(fields),
        cache_salt=_salt(fields),
        trace_id=trace_id,
        **content,
    )
    return Parsed(request, stream, _include_usage(fields.get("stream_options"), stream))


def _fields(body: bytes, supported: frozenset[str]) -> _Fields:
    """The fields that say something, all of them supported."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if not body:
            raise InvalidRequest("the request has no body") from None
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    for name, value in fields.items():
        if name in supported:
            continue
        neutral = _NEUTRAL.get(name)
        if neutral is None:
            raise InvalidRequest(f"{name[:64]}: unknown field", param=name[:64])
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            raise InvalidRequest(f"{name}: this value is not supported", param=name)
    return {name: value for name, value in fields.items() if value is not None}


def _prompt(prompt: Any) -> str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return tuple(prompt)
    raise InvalidRequest("prompt: expected a string or a list of token ids", param="prompt")


def _stop(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > STOPS_MAX
        or not all(isinstance(s, str) and 0 < len(s) <= STOP_CHARS_MAX for s in stops)
    ):
        raise InvalidRequest(
            f"stop: expected at most {STOPS_MAX} strings of 1 to {STOP_CHARS_MAX} characters", param="stop"
        )
    return tuple(stops)


def _response_format(value: Any) -> StructuredOutputs | None:
    """The form of the answer, in OpenAI's words."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidRequest(
            "response_format.type: expected text, json_object or json_schema", param="response_format.type"
        )
    for name in value.keys() - {"type", *(("json_schema",) if kind == "json_schema" else ())}:
        raise InvalidRequest(f"response_format.{name[:64]}: unknown field", param=f"response_format.{name[:64]}")
    if kind == "json_schema":
        return StructuredOutputs(json=_json_schema(value.get("json_schema")))
    return StructuredOutputs(json={"type": "object"}) if kind == "json_object" else None


def _json_schema(value: Any) -> dict[str, Any]:
    place = "response_format.json_schema"
    if not isinstance(value, dict):
        raise InvalidRequest(f"{place}: expected an object", param=place)
    for name in value.keys() - {"name", "description", "schema", "strict"}:
        raise InvalidRequest(f"{place}.{name[:64]}: unknown field", param=f"{place}.{name[:64]}")
    for name in ("name", "description"):  # OpenAI shows them to the model; here they do nothing
        if not isinstance(value.get(name, ""), str | None):
            raise InvalidRequest(f"{place}.{name}: expected a string", param=f"{place}.{name}")
    if not isinstance(value.get("strict"), bool | None):
        raise InvalidRequest(f"{place}.strict: expected true or false", param=f"{place}.strict")
    schema = value.get("schema")
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{place}.schema: expected an object", param=f"{place}.schema")
    return schema


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise InvalidRequest("stream_options: only with stream = true", param="stream_options")
    if not isinstance(options, dict):
        raise InvalidRequest("stream_options: expected an object", param="stream_options")
    for name in options.keys() - {"include_usage"}:
        raise InvalidRequest(f"stream_options.{name[:64]}: unknown field", param="stream_options")
    return _boolean(options, "include_usage")


def _salt(fields: _Fields) -> str | None:
    salt = _string(fields, "cache_salt", CACHE_SALT_CHARS_MAX)
    if salt == "":
        raise InvalidRequest("cache_salt: must not be empty", param="cache_salt")
    return salt


def _boolean(fields: _Fields, name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}: expected true or false", param=name)
    return value


def _number(fields: _Fields, name: str, default: float, low: float, high: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(f"{name}: expected a number from {low:g} to {high:g}", param=name)
    return float(value)


def _integer(fields: _Fields, name: str, default: int | None, low: int, high: int) -> int | None:
    value = fields.get(name, default)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequest(f"{name}: expected an integer of at least {low}", param=name)
    return value


def _string(fields: _Fields, name: str, chars_max: int) -> str | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, str) or len(value) > chars_max):
        raise InvalidRequest(f"{name}: expected a string of at most {chars_max} characters", param=name)
    return value


def _slo_class(fields: _Fields) -> SloClass | None:
    value = fields.get("slo_class")
    if value is None:
        return None
    if not isinstance(value, str) or value not in frozenset(SloClass):
        raise InvalidRequest(f"slo_class: expected one of {', '.join(SloClass)}", param="slo_class")
    return SloClass(value)
