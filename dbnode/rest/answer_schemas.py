"""JSON schemas of what the REST face answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_MS: Schema = {"type": "number", "minimum": 0}
_BOOLEAN: Schema = {"type": "boolean"}
_NULL: Schema = {"type": "null"}


def closed(properties: Schema, *optional: str) -> Schema:
    """An object with just these properties."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


def named(name: str) -> Schema:
    """One of `SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


_TOP = closed({"token": _TEXT, "logprob": {"type": "number"}, "bytes": listed(_COUNT)})
_CHAT_LOGPROBS = closed(
    {
        "content": listed(closed({**_TOP["properties"], "top_logprobs": listed(_TOP)})),
        "refusal": _NULL,
    }
)
_LOGPROBS = closed(
    {
        "tokens": listed(_TEXT),
        "token_logprobs": listed({"type": "number"}),
        "top_logprobs": listed({"type": "object", "additionalProperties": {"type": "number"}}),
        "text_offset": listed(_COUNT),
    }
)
_CALL = closed(
    {"id": _TEXT, "type": {"const": "function"}, "function": closed({"name": _TEXT, "arguments": _TEXT})},
)
_MESSAGE = closed(
    {"role": {"const": "assistant"}, "content": or_null(_TEXT), "refusal": _NULL, "tool_calls": listed(_CALL)},
    "tool_calls",
)
_REASON = {"enum": ["stop", "length", "tool_calls"]}


def _answer(kind: str, choice: Schema, *, is_event: bool = False) -> Schema:
    """Events have usage, null but in the last, only if it was asked for."""
    properties = {
        "id": _TEXT,
        "object": {"const": kind},
        "created": _COUNT,
        "model": _TEXT,
        "choices": listed(choice),
        "usage": or_null(named("Usage")) if is_event else named("Usage"),
        "metrics": named("Metrics"),
    }
    return closed(properties, "metrics", *(("usage",) if is_event else ()))


def _choice(content: Schema, logprobs: Schema, *, is_event: bool = False) -> Schema:
    reason = or_null(_REASON) if is_event else _REASON
    return closed({"index": _COUNT, **content, "logprobs": or_null(logprobs), "finish_reason": reason})


_DELTA = {
    "type": "object",
    "properties": {"role": {"const": "assistant"}, "content": _TEXT, "tool_calls": listed({"type": "object"})},
    "additionalProperties": False,
}
_TIERS = {"l1": _COUNT, "l2": _COUNT, "pool": _COUNT, "disk": _COUNT}

SCHEMAS: Schema = {
    "Error": closed(
        {
            "error": closed(
                {"message": _TEXT, "type": _TEXT, "param": or_null(_TEXT), "code": or_null(_TEXT)},
            )
        }
    ),
    "Usage": closed(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": closed({"cached_tokens": _COUNT}),
            "stratakv": closed({"computed": _COUNT, **_TIERS, "ttft_ms": _MS, "queue_ms": _MS, "e2e_ms": _MS}),
        }
    ),
    "Metrics": closed(
        {
            "time_to_first_token_ms": or_null(_MS),
            "queue_time_ms": _MS,
            "generation_time_ms": or_null(_MS),
            "mean_itl_ms": or_null(_MS),
            "cached_tokens": closed(_TIERS),
        }
    ),
    "ChatCompletion": _answer("chat.completion", _choice({"message": _MESSAGE}, _CHAT_LOGPROBS)),
    "ChatCompletionEvent": _answer(
        "chat.completion.chunk", _choice({"delta": _DELTA}, _CHAT_LOGPROBS, is_event=True), is_event=True
    ),
    "Completion": _answer("text_completion", _choice({"text": _TEXT}, _LOGPROBS)),
    "CompletionEvent": _answer("text_completion", _choice({"text": _TEXT}, _LOGPROBS, is_event=True), is_event=True),
    "Model": closed(
        {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT, "max_model_len": _COUNT}
    ),
    "Models": closed({"object": {"const": "list"}, "data": listed(named("Model"))}),
    "Tokens": closed(
        {"count": _COUNT, "max_model_len": _COUNT, "tokens": listed(_COUNT), "token_strs": or_null(listed(_TEXT))}
    ),
    "DetokenizedText": closed({"prompt": _TEXT}),
    "Pinned": closed(
        {
            "object": {"const": "stratakv.pin"},
            "prompt_tokens": _COUNT,
            "blocks": _COUNT,
            "pins": listed(closed({"id": _TEXT, "namespace": _TEXT, "blocks": _COUNT})),
        }
    ),
    "Alive": closed({"status": {"const": "alive"}}),
    "Ready": closed({"ready": _BOOLEAN, "reasons": listed(_TEXT)}),
    "Version": closed({"version": _TEXT}),
    "Object": {"type": "object"},
}
