"""OpenAI request bodies → `GenerateRequest`s. Strict: a field or value that is not supported is refused by name, never ignored.

Protocol code: bytes in, values out. Raises InvalidRequest whose `param` is the field. What an endpoint takes stands in its table
of fields, from which the OpenAPI document is made too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from dbnode.generate import Caller, GenerateRequest, Sampling, Source, StructuredOutputs
from dbnode.rest.fields import Boolean, Field, Integer, Number, Schema, Unsupported, read_fields
from dbnode.rest.messages_schema import MESSAGES_SCHEMA
from dbnode.rest.sampling_fields import CACHE_SALT, CHOICES_MAX, INTEGER_MAX, LOGPROBS_MAX, MODEL, SAMPLING, SHARED
from dbnode.rest.template_fields import TEMPLATE, chat_style
from dbnode.rest.tools import ToolChoice, Tools, ToolUse, tool_use
from dbnode.rest.unsupported_fields import UNSUPPORTED_CHAT, UNSUPPORTED_COMPLETION
from stratakv.errors import InvalidRequest

COMPLETION_MAX_TOKENS_DEFAULT = 16
"""OpenAI's default for /v1/completions; a chat answer is as long as the context allows."""
PIN_S_MAX = 30 * 24 * 3600.0

_Given = Mapping[str, Any]
_TOKEN_IDS_SCHEMA: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


class Asked(msgspec.Struct, frozen=True):
    """Of whom and how a request came, beside its body."""

    request_id: str
    trace_id: str
    caller: Caller = Caller()
    traceparent: str | None = None
    wants_timing: bool = False


class Parsed(msgspec.Struct, frozen=True):
    """Prompts, how many answers each of them gets, and the form these are to have."""

    prompts: tuple[GenerateRequest, ...]
    num_answers: int = 1
    """To each prompt."""
    stream: bool = False
    include_usage: bool = False
    wants_timing: bool = False
    tools: ToolUse | None = None
    echo: bool = False
    """Each answer begins with its prompt."""

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.num_answers

    @property
    def request(self) -> GenerateRequest:
        """The first one, by whose id the answer goes."""
        return self.prompts[0]


class Messages:
    """Chat messages; what is in them is checked when they are written by the template."""

    schema = MESSAGES_SCHEMA

    def read(self, name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not value:
            raise InvalidRequest(f"{name}: expected a list with at least one message", param=name)
        return tuple(value)


class Prompts:
    """One prompt or several, each as text or as token ids."""

    schema: Schema = {  # noqa: RUF012
        "anyOf": [
            {"type": "string", "minLength": 1},
            _TOKEN_IDS_SCHEMA,
            {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": CHOICES_MAX},
            {"type": "array", "items": _TOKEN_IDS_SCHEMA, "minItems": 1, "maxItems": CHOICES_MAX},
        ]
    }

    def read(self, name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
        several = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
        if len({type(one) for one in several}) > 1:
            raise InvalidRequest(f"{name}: expected all prompts as text, or all as token ids", param=name)
        if len(several) > CHOICES_MAX:
            raise InvalidRequest(f"{name}: at most {CHOICES_MAX} prompts", param=name)
        return tuple(_one_prompt(name, one) for one in several)


def _one_prompt(name: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return tuple(value)
    raise InvalidRequest(f"{name}: expected text or a list of token ids, or a list of these", param=name)


CHAT: dict[str, Field] = {
    **SHARED,
    **TEMPLATE,
    **UNSUPPORTED_CHAT,
    "messages": Messages(),
    "max_completion_tokens": Integer(1, INTEGER_MAX),
    "logprobs": Boolean(),
    "top_logprobs": Integer(0, LOGPROBS_MAX),
    "tools": Tools(),
    "tool_choice": ToolChoice(),
    "parallel_tool_calls": Boolean(),
}
COMPLETION: dict[str, Field] = {
    **SHARED,
    **UNSUPPORTED_COMPLETION,
    "prompt": Prompts(),
    "logprobs": Integer(0, LOGPROBS_MAX),
    "echo": Boolean(),
}
TURN: dict[str, Field] = {
    **CHAT,
    "add_generation_prompt": Unsupported((True,)),
    "continue_final_message": Unsupported((False,), "A turn begins with a message of its own."),
    "truncate_prompt_tokens": Unsupported((), "A fork at an earlier item is shorter."),
    "version": Integer(0, INTEGER_MAX),
    "n": Unsupported((1,)),
    "tools": Unsupported(([],)),
    "tool_choice": Unsupported(("none", "auto")),
    "parallel_tool_calls": Unsupported((True, False)),
}
"""Of a turn in a conversation, whose messages are those to add."""
PIN: dict[str, Field] = {
    "messages": Messages(),
    "prompt": Prompts(),
    "model": MODEL,
    "cache_salt": CACHE_SALT,
    "seconds": Number(1.0, PIN_S_MAX),
}


class DroppedTiers:
    """Tiers that workers are to forget."""

    schema: Schema = {"type": "array", "items": {"enum": ["l1", "l2"]}}  # noqa: RUF012

    def read(self, name: str, value: Any) -> list[str]:
        if not isinstance(value, list) or not all(tier in ("l1", "l2") for tier in value):
            raise InvalidRequest(f"{name}: expected l1, l2 or both", param=name)
        return value


DROP: dict[str, Field] = {"tiers": DroppedTiers()}


def parse_chat(body: bytes, asked: Asked) -> Parsed:
    """POST /v1/chat/completions."""
    return _chat(read_fields(body, CHAT), asked)


def parse_turn(body: bytes, asked: Asked) -> tuple[Parsed, int | None]:
    """POST /v1/conversations/ID/messages: what a chat takes, and the version that the conversation is expected to have."""
    given = read_fields(body, TURN)
    return _chat(given, asked), given.get("version")


def _chat(given: _Given, asked: Asked) -> Parsed:
    if "messages" not in given:
        raise InvalidRequest("messages: expected a list with at least one message", param="messages")
    top_logprobs = given.get("top_logprobs", 0)
    if top_logprobs and not given.get("logprobs"):
        raise InvalidRequest("top_logprobs: only with logprobs = true", param="top_logprobs")
    tools = tool_use(given)
    form = _form(given)
    if form is not None and tools is not None:
        raise InvalidRequest("response_format: only text where tools may be called", param="response_format")
    sampling = _sampling(
        given,
        max_tokens=given.get("max_completion_tokens", given.get("max_tokens")),
        logprobs=top_logprobs if given.get("logprobs") else None,
        structured_outputs=form if tools is None else tools.form(),
    )
    messages, style = given["messages"], chat_style(given)
    request = _request(given, asked, sampling, messages=messages, tools=given.get("tools", ()), style=style)
    return _parsed(given, asked, (request,), tools)


def parse_completion(body: bytes, asked: Asked) -> Parsed:
    """POST /v1/completions."""
    given = read_fields(body, COMPLETION)
    if given.get("echo") and "logprobs" in given:
        raise InvalidRequest(
            "echo: not with logprobs", hint="There are no log-probabilities of a prompt's tokens.", param="echo"
        )
    sampling = _sampling(
        given,
        max_tokens=given.get("max_tokens", COMPLETION_MAX_TOKENS_DEFAULT),
        logprobs=given.get("logprobs"),
        structured_outputs=_form(given),
    )
    prompts = _prompts(given)
    requests = tuple(_request(given, asked, sampling, index, prompt=prompt) for index, prompt in enumerate(prompts))
    return _parsed(given, asked, requests, None)


def parse_pin(body: bytes) -> tuple[GenerateRequest, float]:
    """POST /v1/stratakv/pin: whose prompt is to be kept, and for how many seconds."""
    given = read_fields(body, PIN)
    messages = given.get("messages")
    if messages is not None and "prompt" in given:
        raise InvalidRequest("messages: expected a list with at least one message, and no prompt", param="messages")
    if "seconds" not in given:
        raise InvalidRequest("seconds: how long the prompt is to be kept", param="seconds")
    if messages is not None:
        return _request(given, Asked("", ""), Sampling(), messages=messages), given["seconds"]
    prompts = _prompts(given)
    if len(prompts) > 1:
        raise InvalidRequest("prompt: expected one prompt", param="prompt")
    return _request(given, Asked("", ""), Sampling(), prompt=prompts[0]), given["seconds"]


def _prompts(given: _Given) -> tuple[str | tuple[int, ...], ...]:
    if "prompt" not in given:
        raise InvalidRequest("prompt: expected text or a list of token ids, or a list of these", param="prompt")
    prompts: tuple[str | tuple[int, ...], ...] = given["prompt"]
    return prompts


def _form(given: _Given) -> StructuredOutputs | None:
    """What the answer is held to, by either of the two fields."""
    form: StructuredOutputs | None = given.get("structured_outputs")
    if form is not None and "response_format" in given:
        raise InvalidRequest("structured_outputs: not with response_format", param="structured_outputs")
    return form or given.get("response_format")


def _sampling(given: _Given, **more: Any) -> Sampling:
    chosen = {name: value for name, value in given.items() if name in SAMPLING}
    if chosen.get("top_k") == -1:
        chosen["top_k"] = 0
    sampling = Sampling(**chosen, **more)
    if sampling.min_tokens and sampling.structured_outputs is not None:
        raise InvalidRequest("min_tokens: an answer that must have a form ends when it is whole", param="min_tokens")
    return sampling


def _request(given: _Given, asked: Asked, sampling: Sampling, index: int = 0, **content: Any) -> GenerateRequest:
    return GenerateRequest(
        request_id=asked.request_id if not index else f"{asked.request_id}.p{index}",
        source=Source.REST,
        arrived_s=time.monotonic(),
        model=given.get("model"),
        sampling=sampling,
        priority=given.get("priority", 0),
        slo_class=given.get("slo_class"),
        cache_salt=given.get("cache_salt"),
        prompt_tokens_max=_prompt_tokens_max(given),
        caller=asked.caller,
        trace_id=asked.trace_id,
        traceparent=asked.traceparent,
        **content,
    )


def _prompt_tokens_max(given: _Given) -> int | None:
    wanted: int | None = given.get("truncate_prompt_tokens")
    if wanted == 0:
        raise InvalidRequest("truncate_prompt_tokens: expected -1, or 1 and more", param="truncate_prompt_tokens")
    return 0 if wanted == -1 else wanted


def _parsed(given: _Given, asked: Asked, prompts: tuple[GenerateRequest, ...], tools: ToolUse | None) -> Parsed:
    stream, num_answers = given.get("stream", False), given.get("n", 1)
    if "stream_options" in given and not stream:
        raise InvalidRequest("stream_options: only with stream = true", param="stream_options")
    if len(prompts) * num_answers > CHOICES_MAX:
        raise InvalidRequest(f"n: at most {CHOICES_MAX} answers to all prompts together", param="n")
    options, echo = given.get("stream_options", False), given.get("echo", False)
    return Parsed(prompts, num_answers, stream, options, asked.wants_timing, tools, echo)
