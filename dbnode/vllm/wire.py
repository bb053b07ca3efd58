"""A request of the DB node in the words of vLLM's OpenAI server, and its answer back again. No I/O.

Where vLLM differs from our own workers: it knows nothing of tokens that were generated elsewhere, so they become part of the
prompt. That is not possible for an answer that must have a form, whose beginning vLLM has not seen, nor for a seeded one,
whose random numbers begin anew, nor where tokens of the output are penalised: such an answer is generated again from its
beginning, and must begin with the same tokens.
"""

from __future__ import annotations

import enum
import zlib
from dataclasses import dataclass
from typing import Any

import msgspec

from dbnode.errors import WorkerLost, WorkerRefused
from dbnode.generate import FinishReason
from dbnode.worker_client import told
from dbnode.worker_messages import (
    KVTransfer,
    WorkerChoice,
    WorkerChunk,
    WorkerError,
    WorkerLogprobs,
    WorkerRequest,
    WorkerTimes,
    WorkerUsage,
)
from stratakv.errors import StrataError


class Part(enum.Enum):
    """What of a request a vLLM server is to do."""

    ALL = enum.auto()
    PREFILL = enum.auto()
    """Compute the prompt and one token."""


class VllmChoice(msgspec.Struct, frozen=True):
    text: str = ""
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: WorkerLogprobs | None = None


class VllmPromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class VllmUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: VllmPromptDetails | None = None


class VllmTimes(msgspec.Struct, frozen=True):
    queue_time_ms: float | None = None


class VllmChunk(msgspec.Struct, frozen=True):
    """One event of a stream."""

    choices: list[VllmChoice] = []
    usage: VllmUsage | None = None
    metrics: VllmTimes | None = None
    error: WorkerError | None = None


class ModelCard(msgspec.Struct, frozen=True):
    """One of GET /v1/models."""

    id: str
    max_model_len: int | None = None
    parent: str | None = None
    """Of an adapter: its base model."""


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]


class Introduction(msgspec.Struct, frozen=True):
    """What the connector says of itself."""

    namespace: str


class IntroductionParams(msgspec.Struct, frozen=True):
    stratakv: Introduction | None = None


class Introduced(msgspec.Struct, frozen=True):
    """Answer of POST /v1/completions that is not streamed, as far as it is of use."""

    kv_transfer_params: IntroductionParams | None = None


class Tokens(msgspec.Struct, frozen=True):
    """Answer of POST /tokenize."""

    tokens: list[int]


_decode_chunk = msgspec.json.Decoder(VllmChunk).decode


def must_begin_again(request: WorkerRequest) -> bool:
    """Whether an answer cannot go on from tokens that another worker made."""
    penalizes_output = bool(request.presence_penalty or request.frequency_penalty)
    is_seeded = request.seed is not None and request.temperature > 0
    return request.structured_outputs is not None or penalizes_output or is_seeded


def body(request: WorkerRequest, model: str, part: Part) -> dict[str, Any]:
    """Body of POST /v1/completions. Everything is said, so that the server's own defaults do not matter."""
    before = [] if must_begin_again(request) else _made(request)
    fields: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt + before if before else request.prompt,
        "max_tokens": _max_tokens(request, part),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "ignore_eos": request.ignore_eos,
        "request_id": request.request_id,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if request.seed is not None:
        fields["seed"] = request.seed
    elif must_begin_again(request) and request.temperature > 0:
        fields["seed"] = _seed_of(request)
    for name in ("presence_penalty", "frequency_penalty", "logit_bias", "stop_token_ids", "include_stop_str_in_output"):
        if value := getattr(request, name):
            fields[name] = value
    if not request.skip_special_tokens:
        fields["skip_special_tokens"] = False
    if request.min_tokens:
        fields["min_tokens"] = min(fields["max_tokens"], max(0, request.min_tokens - len(before)))
    if request.logprobs is not None:
        fields |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
    if request.cache_salt is not None:
        fields["cache_salt"] = request.cache_salt
    if request.stop and part is Part.ALL:
        fields["stop"] = request.stop
    if request.structured_outputs is not None and part is Part.ALL:
        fields["structured_outputs"] = request.structured_outputs
    return fields


def _seed_of(request: WorkerRequest) -> int:
    """The same on every worker that the request is sent to, so that each begins with the same tokens."""
    return zlib.crc32(request.request_id.rpartition("-")[0].encode())


def introduction(model: str, token_id: int) -> dict[str, Any]:
    """Body of a POST /v1/completions that asks the connector, if there is one, which blocks it writes."""
    fields = {"model": model, "prompt": [token_id], "max_tokens": 1, "temperature": 0}
    return fields | {"kv_transfer_params": {"stratakv": "who"}}


def _made(request: WorkerRequest) -> list[int]:
    return request.kv_transfer_params.output_token_ids if request.kv_transfer_params else []


def _max_tokens(request: WorkerRequest, part: Part) -> int:
    if part is Part.PREFILL:
        return 1
    return max(1, request.max_tokens - (0 if must_begin_again(request) else len(_made(request))))


@dataclass(slots=True)
class Reader:
    """One answer's events, as our own workers would have sent them."""

    url: str
    request: WorkerRequest
    part: Part
    _num_repeated: int = 0
    """Tokens seen that had been handed on before."""

    def read(self, payload: bytes) -> WorkerChunk:
        """Raises what the server says, or what is wrong with its answer."""
        try:
            chunk = _decode_chunk(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WorkerRefused(f"{self.url} sent what is no completion: {error}") from None
        if chunk.error is not None:
            raise said(self.url, chunk.error)
        choices = [self._choice(choice) for choice in chunk.choices]
        return WorkerChunk(choices=choices, usage=self._usage(chunk))

    def _choice(self, choice: VllmChoice) -> WorkerChoice:
        if choice.token_ids is None and choice.text:
            raise WorkerRefused(f"{self.url} sends text without token ids: it is older than return_token_ids")
        token_ids = choice.token_ids or []
        reason = None if choice.finish_reason is None else self._reason(choice.finish_reason)
        if reason is FinishReason.STOP and not isinstance(choice.stop_reason, str):
            token_ids = token_ids[: len(token_ids) - self._hides_last(token_ids)]
        if not must_begin_again(self.request):
            is_full = len(_made(self.request)) >= self.request.max_tokens  # vLLM generates one token at least
            return _told(choice, 0, 0 if is_full else len(token_ids), reason)
        if self.part is Part.PREFILL:
            return WorkerChoice(token_ids=[], finish_reason=reason and FinishReason.LENGTH)
        num_new = len(self._new(token_ids, reason))
        return _told(choice, len(token_ids) - num_new, len(token_ids), reason)

    def _hides_last(self, token_ids: list[int]) -> bool:
        """Our own workers do not send a token that ends the answer, unless they are asked for it."""
        if not token_ids or not self.request.include_stop_str_in_output:
            return bool(token_ids)
        return token_ids[-1] not in self.request.stop_token_ids

    def _reason(self, text: str) -> FinishReason:
        if text in (FinishReason.STOP, FinishReason.LENGTH):
            return FinishReason(text)
        if text == "abort":
            raise WorkerLost(f"{self.url} gave the request up")
        raise WorkerRefused(f"{self.url} ended the answer for the reason {text!r}")

    def _new(self, token_ids: list[int], reason: FinishReason | None) -> list[int]:
        """Those that were not handed on before by another worker."""
        before = _made(self.request)[self._num_repeated :]
        num_same = min(len(before), len(token_ids))
        self._num_repeated += num_same
        if token_ids[:num_same] != before[:num_same] or (reason is not None and len(before) > num_same):
            raise WorkerRefused(f"{self.url} does not begin the answer as the worker before it had")
        return token_ids[num_same:]

    def _usage(self, chunk: VllmChunk) -> WorkerUsage | None:
        """vLLM tells how much it did not compute, not where from; what was handed over came from the pool."""
        usage, times = chunk.usage, chunk.metrics
        if usage is None:
            return None
        details, num_prompt = usage.prompt_tokens_details, len(self.request.prompt)
        num_cached = min(details.cached_tokens or 0 if details else 0, num_prompt)
        transfer = self.request.kv_transfer_params or KVTransfer()
        from_pool = num_cached if transfer.do_remote_prefill else 0
        said_times = WorkerTimes(
            computed=num_prompt - num_cached,
            l1=num_cached - from_pool,
            pool=from_pool,
            queue_ms=times.queue_time_ms or 0.0 if times else 0.0,
        )
        return WorkerUsage(usage.prompt_tokens, usage.completion_tokens or 0, said_times)


def _told(choice: VllmChoice, start: int, stop: int, reason: FinishReason | None) -> WorkerChoice:
    """A part of the choice's tokens, with what is said of them."""
    logprobs = choice.logprobs
    if logprobs is not None:
        tops = logprobs.top_logprobs
        logprobs = WorkerLogprobs(logprobs.token_logprobs[start:stop], tops[start:stop] if tops else None)
    return WorkerChoice((choice.token_ids or [])[start:stop], logprobs, reason)


def said(url: str, error: WorkerError, status: int | None = None) -> StrataError:
    """vLLM's own words as the error whose handling fits; in a stream the status stands in the error itself."""
    code = error.code if isinstance(error.code, int) else None
    return told(url, msgspec.structs.replace(error, code=None), status or code)


def refusal(url: str, status: int, answer: bytes) -> StrataError:
    """Of an answer that is no stream."""
    try:
        error = _decode_chunk(answer).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        error = None
    return said(url, error or WorkerError(f"status {status}"), status)
