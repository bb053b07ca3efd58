"""Answers in OpenAI's form, whole and as server-sent events. Protocol code; the events are on the hot path."""

from __future__ import annotations

import enum
import time
from typing import Any

import msgspec

from dbnode.generate import Answer, Usage

json_bytes = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


class Form(enum.Enum):
    """Which endpoint's objects an answer is made of."""

    CHAT = "chat.completion"
    COMPLETION = "text_completion"

    @property
    def id_prefix(self) -> str:
        return "chatcmpl-" if self is Form.CHAT else "cmpl-"


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage, with the prompt's tokens by tier and the times of this request beside it."""
    tiers, timings = usage.tiers, usage.timings
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": tiers.num_cached},
        "stratakv": {
            "computed": tiers.computed,
            "l1": tiers.l1,
            "l2": tiers.l2,
            "pool": tiers.pool,
            "disk": tiers.disk,
            "ttft_ms": round(timings.ttft_ms, 3),
            "queue_ms": round(timings.queue_ms, 3),
            "e2e_ms": round(timings.e2e_ms, 3),
        },
    }


def whole_answer(form: Form, request_id: str, model: str, answer: Answer) -> bytes:
    """The body of an answer that is not streamed."""
    assert answer.usage is not None
    text = "".join(answer.text)
    message = {"role": "assistant", "content": text, "refusal": None}
    content: dict[str, Any] = {"message": message} if form is Form.CHAT else {"text": text}
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": answer.finish_reason}
    head = {"id": request_id, "object": form.value, "created": int(time.time()), "model": model}
    return json_bytes(head | {"choices": [choice], "usage": usage_object(answer.usage)})


class EventWriter:
    """Server-sent events of one answer. What is the same in all of them is encoded once."""

    def __init__(self, form: Form, request_id: str, model: str, *, include_usage: bool) -> None:
        kind = "chat.completion.chunk" if form is Form.CHAT else form.value
        head = json_bytes({"id": request_id, "object": kind, "created": int(time.time()), "model": model})
        self._form = form
        self._head = b"data: " + head[:-1] + b',"choices":'
        self._before = self._head + b'[{"index":0,' + (b'"delta":{"content":' if form is Form.CHAT else b'"text":')
        close = b"}" if form is Form.CHAT else b""
        nothing_used = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._after = close + b',"logprobs":null,"finish_reason":null}]' + nothing_used
        self._nothing_used = nothing_used

    def first(self) -> bytes:
        """What a chat begins with."""
        if self._form is not Form.CHAT:
            return b""
        choice = b'[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        return self._head + choice + self._nothing_used

    def text(self, text: str) -> bytes:
        return self._before + json_bytes(text) + self._after

    def last(self, finish_reason: str) -> bytes:
        content = b'"delta":{}' if self._form is Form.CHAT else b'"text":""'
        choice = b'[{"index":0,' + content + b',"logprobs":null,"finish_reason":' + json_bytes(finish_reason) + b"}]"
        return self._head + choice + self._nothing_used

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'[],"usage":' + json_bytes(usage_object(usage)) + b"}\n\n"


def error_event(error: dict[str, Any]) -> bytes:
    """An error after the answer has begun."""
    return b"data: " + json_bytes({"error": error}) + b"\n\n"
