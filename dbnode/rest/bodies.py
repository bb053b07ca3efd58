"""Answers in OpenAI's form, whole and as server-sent events. Protocol code; the events are on the hot path."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from dbnode.generate import PromptTiers, Timings, Usage
from dbnode.rest.form import Form

json_bytes = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


def total(usages: Sequence[Usage]) -> Usage:
    """Of several answers to one request: the first token of any, the end of all."""
    if len(usages) == 1:
        return usages[0]
    tiers = [usage.tiers for usage in usages]
    timings = [usage.timings for usage in usages]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        tiers=PromptTiers(*(sum(getattr(t, name) for t in tiers) for name in PromptTiers.__struct_fields__)),
        timings=Timings(
            ttft_ms=min((t.ttft_ms for t in timings if t.ttft_ms), default=0.0),
            queue_ms=min(t.queue_ms for t in timings),
            e2e_ms=max(t.e2e_ms for t in timings),
        ),
    )


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


def metrics_object(usage: Usage, num_answers: int) -> dict[str, Any]:
    """The times of one request by vLLM's names. The gap between tokens says something of a single answer only."""
    timings = usage.timings
    generation_ms = timings.e2e_ms - timings.ttft_ms if timings.ttft_ms else None
    num_gaps = usage.completion_tokens - 1 if num_answers == 1 else 0
    has_gaps = generation_ms is not None and num_gaps > 0
    cached = {name: getattr(usage.tiers, name) for name in ("l1", "l2", "pool", "disk")}
    return {
        "time_to_first_token_ms": round(timings.ttft_ms, 3) or None,
        "queue_time_ms": round(timings.queue_ms, 3),
        "generation_time_ms": None if generation_ms is None else round(generation_ms, 3),
        "mean_itl_ms": round((generation_ms or 0.0) / num_gaps, 3) if has_gaps else None,
        "cached_tokens": cached,
    }


def whole(form: Form, request_id: str, model: str, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
    """The body of an answer that is not streamed; `more` has usage and what else was asked for."""
    head = {"id": request_id, "object": form.value, "created": int(time.time()), "model": model}
    return json_bytes(head | {"choices": choices} | more)


class EventWriter:
    """Server-sent events of one answer. What is the same in all of them is encoded once."""

    def __init__(self, form: Form, request_id: str, model: str, *, include_usage: bool, index: int = 0) -> None:
        kind = "chat.completion.chunk" if form is Form.CHAT else form.value
        head = json_bytes({"id": request_id, "object": kind, "created": int(time.time()), "model": model})
        self._form = form
        self._head = b"data: " + head[:-1] + b',"choices":'
        self._choice = self._head + b'[{"index":' + json_bytes(index) + b","
        self._before = self._choice + (b'"delta":{"content":' if form is Form.CHAT else b'"text":')
        self._close = b"}" if form is Form.CHAT else b""
        self._nothing_used = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._after = self._close + b',"logprobs":null,"finish_reason":null}]' + self._nothing_used

    def first(self) -> bytes:
        """What a chat begins with."""
        if self._form is not Form.CHAT:
            return b""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        return self._choice + delta + self._nothing_used

    def text(self, text: str) -> bytes:
        return self._before + json_bytes(text) + self._after

    def scored(self, text: str, logprobs: dict[str, Any]) -> bytes:
        """Text with its tokens' log-probabilities; there may be tokens whose text is still to come."""
        after = b',"logprobs":' + json_bytes(logprobs) + b',"finish_reason":null}]' + self._nothing_used
        return self._before + json_bytes(text) + self._close + after

    def call(self, call: dict[str, Any]) -> bytes:
        """A part of a call of a tool."""
        delta = b'"delta":{"tool_calls":[' + json_bytes(call) + b']},"logprobs":null,"finish_reason":null}]'
        return self._choice + delta + self._nothing_used

    def last(self, finish_reason: str) -> bytes:
        content = b'"delta":{}' if self._form is Form.CHAT else b'"text":""'
        end = content + b',"logprobs":null,"finish_reason":' + json_bytes(finish_reason) + b"}]"
        return self._choice + end + self._nothing_used

    def end(self, more: dict[str, Any]) -> bytes:
        """Usage, and what else was asked for, beside no choice."""
        return self._head + b"[]," + json_bytes(more)[1:] + b"\n\n"


def error_event(error: dict[str, Any]) -> bytes:
    """An error after the answer has begun."""
    return b"data: " + json_bytes({"error": error}) + b"\n\n"
