"""What the DB node's faces ask of inference, and what they get: plain values, no I/O."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dbnode.charge import Charge
from dbnode.tenants.account import Reservation
from dbnode.tenants.salts import combined_salt
from stratakv.tenancy.values import DEFAULT_TENANT, Tenant
from stratakv.text import PLAIN_CHAT, ChatStyle


class Source(enum.StrEnum):
    """The face a request came in by; admission is fair between them."""

    REST = "rest"
    SQL = "sql"


class SloClass(enum.StrEnum):
    """What a request is for (`dbnode.slo`)."""

    INTERACTIVE = "interactive"
    """Somebody waits for it."""
    BATCH = "batch"


class FinishReason(enum.StrEnum):
    """OpenAI's reasons for the end of an answer."""

    STOP = "stop"
    LENGTH = "length"


class StructuredOutputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """The form an answer must have; exactly one is given. As workers are told."""

    json: dict[str, Any] | None = None
    """A JSON schema."""
    choice: list[str] | None = None
    regex: str | None = None


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are chosen, and when to stop."""

    max_tokens: int | None = None
    """None: as many as the context has room for."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """They end the answer and are not told."""
    min_tokens: int = 0
    """Before so many tokens nothing that is generated ends the answer."""
    include_stop_str_in_output: bool = False
    """Tell the stop string, or the token of `stop_token_ids`, that ended it."""
    skip_special_tokens: bool = True
    """Leave the text of special tokens out."""
    structured_outputs: StructuredOutputs | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits."""
    logprobs: int | None = None
    """Tell the log-probability of each token, and of so many of the likeliest ones at its place."""


class TokenScore(msgspec.Struct, frozen=True):
    """How likely a token was, before temperature, penalties and forms."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Token ids and log-probabilities of the likeliest ones, in no order."""


class Caller(msgspec.Struct, frozen=True):
    """Who is asking."""

    tenant: Tenant = DEFAULT_TENANT
    models: frozenset[str] | None = None
    """Those it may use, as its key and its tenant allow; None: all."""
    role: str | None = None
    database: str | None = None
    session: str | None = None


class GenerateRequest(msgspec.Struct, frozen=True):
    """One answer to generate. Exactly one of `messages` and `prompt` is given."""

    request_id: str
    """Unique; usage is written once per id."""
    source: Source
    arrived_s: float
    """Monotonic time of arrival."""
    model: str | None = None
    """None: the model this node serves."""
    messages: tuple[object, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    style: ChatStyle = PLAIN_CHAT
    """How messages are written."""
    prompt_tokens_max: int | None = None
    """Of a longer prompt only its last tokens are used; 0: as many as the context has room for."""
    sampling: Sampling = Sampling()
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the model is told that it may call, in OpenAI's form."""
    priority: int = 0
    """Requests with a lower one are let in first, as in vLLM."""
    slo_class: SloClass | None = None
    """None: that of its face."""
    cache_salt: str | None = None
    """What the request itself asks to be kept apart by."""
    deadline_s: float | None = None
    """Monotonic; the node's own limit holds too."""
    caller: Caller = Caller()
    trace_id: str | None = None
    """The client's name for the request, for logs."""
    traceparent: str | None = None
    """W3C trace context, for the worker."""
    is_sibling: bool = False
    """One of several answers to a prompt; another request's usage has the prompt."""
    on_settled: Callable[[Settled], None] | None = None
    """Told once, when the request has ended, whatever the end."""
    charge: Charge | None = None
    """Decides later whether its usage counts; without it, it does."""
    reservation: Reservation | None = None
    """Of its tenant's quota, if that was made before."""

    @property
    def kv_salt(self) -> str | None:
        """KV is shared only between requests with the same one: of the tenant and of the request."""
        return combined_salt(self.caller.tenant.salt, self.cache_salt)


class PromptTiers(msgspec.Struct, frozen=True):
    """Prompt tokens by where their KV came from."""

    computed: int = 0
    l1: int = 0
    l2: int = 0
    pool: int = 0
    disk: int = 0

    @property
    def num_cached(self) -> int:
        return self.l1 + self.l2 + self.pool + self.disk


class Timings(msgspec.Struct, frozen=True):
    """Measured from the arrival of the request."""

    ttft_ms: float
    queue_ms: float
    """Waiting in the DB node and in the first worker."""
    e2e_ms: float


class Usage(msgspec.Struct, frozen=True):
    """What one request took."""

    prompt_tokens: int
    completion_tokens: int
    tiers: PromptTiers
    timings: Timings


class Outcome(enum.StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    UNUSED = "unused"
    """Made ahead of a statement that did not ask for it after all: not charged."""


class Settled(msgspec.Struct, frozen=True):
    """A request that has ended, whatever the end."""

    request: GenerateRequest
    model: str
    outcome: Outcome
    error_code: str | None
    usage: Usage


class Chunk(msgspec.Struct, frozen=True):
    """A piece of the answer. The last one has `finish_reason` and `usage`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    scores: tuple[TokenScore, ...] = ()
    """Of the tokens, if they were asked for."""
    index: int = 0
    """Which of several answers to one request it belongs to."""


@dataclass(slots=True)
class Answer:
    """A whole answer, gathered from its chunks."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    scores: list[TokenScore] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.text.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.scores.extend(chunk.scores)
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.usage = chunk.usage or self.usage
