"""What the DB node and its workers say to each other over HTTP: OpenAI's completions form, with token ids and KV transfer."""

from __future__ import annotations

import enum
import re

import msgspec

from dbnode.generate import FinishReason, PromptTiers, StructuredOutputs, TokenScore
from stratakv.keys import NAMESPACE_BYTES
from stratakv.tenancy.values import OWNER_HEADER
from stratakv.wire import WorkerRole
from stratakv.worker_profile import WorkerProfile

_NAMESPACE = re.compile(rf"[0-9a-f]{{{2 * NAMESPACE_BYTES}}}")


class KVTransfer(msgspec.Struct, frozen=True, omit_defaults=True):
    """How prefill and decode on two workers hand a request over; also how an answer is continued elsewhere."""

    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    num_tokens: int = 0
    output_token_ids: list[int] = []
    is_followed: bool = False
    """Of a prefill: the decode worker follows it already, and takes the first token from it."""
    remote_url: str = ""
    remote_request_id: str = ""
    """Of a decode: the prefill to follow."""


class UsageOptions(msgspec.Struct, frozen=True):
    include_usage: bool = True


class WorkerRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Body of a worker's POST /v1/completions."""

    model: str
    prompt: list[int]
    request_id: str
    max_tokens: int
    temperature: float
    timeout_s: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = []
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: UsageOptions | None = None
    return_token_ids: bool = False
    kv_transfer_params: KVTransfer | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    return_tokens_as_token_ids: bool = False
    """Asked for with `logprobs`."""
    traceparent: str | None = None
    """Sent as a header."""
    owner: int = 0
    """The same: workers of the release before know no such field, and vLLM does not."""

    @property
    def headers(self) -> dict[str, str]:
        """Of the HTTP request it is sent with."""
        traced = {"traceparent": self.traceparent} if self.traceparent else {}
        owned = {OWNER_HEADER: str(self.owner)} if self.owner else {}
        return {"X-Request-Id": self.request_id, **traced, **owned}


class WorkerTimes(PromptTiers, frozen=True):
    queue_ms: float = 0.0


class WorkerUsage(msgspec.Struct, frozen=True):
    """What a worker says it did."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    stratakv: WorkerTimes | None = None


class WorkerLogprobs(msgspec.Struct, frozen=True):
    """Of the tokens beside it. Tokens are written `token_id:N`."""

    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None

    def scores(self) -> list[TokenScore]:
        """Raises ValueError for what is no token id."""
        tops = self.top_logprobs or [None] * len(self.token_logprobs)
        return [
            TokenScore(logprob or 0.0, tuple((_token_id(text), value) for text, value in (top or {}).items()))
            for logprob, top in zip(self.token_logprobs, tops, strict=True)
        ]


def _token_id(text: str) -> int:
    return int(text.removeprefix("token_id:"))


class WorkerChoice(msgspec.Struct, frozen=True):
    token_ids: list[int] | None = None
    logprobs: WorkerLogprobs | None = None
    finish_reason: FinishReason | None = None
    kv_transfer_params: KVTransfer | None = None


class WorkerError(msgspec.Struct, frozen=True):
    message: str = "the worker said nothing more"
    type: str | None = None
    code: str | int | None = None
    param: str | None = None


class WorkerChunk(msgspec.Struct, frozen=True):
    """One event of a worker's stream; requests ask for one choice."""

    choices: list[WorkerChoice] = []
    usage: WorkerUsage | None = None
    kv_transfer_params: KVTransfer | None = None
    error: WorkerError | None = None

    @property
    def token_ids(self) -> list[int]:
        """The tokens of this event."""
        if len(self.choices) == 1:
            return self.choices[0].token_ids or []
        return [token_id for choice in self.choices for token_id in choice.token_ids or ()]

    @property
    def has_only_tokens(self) -> bool:
        """Nothing but tokens of one choice."""
        if len(self.choices) != 1 or self.usage is not None or self.kv_transfer_params is not None:
            return False
        choice = self.choices[0]
        return choice.finish_reason is None and choice.logprobs is None and choice.kv_transfer_params is None

    def with_tokens_of(self, later: WorkerChunk) -> WorkerChunk:
        """Both have only tokens."""
        return WorkerChunk([WorkerChoice([*self.token_ids, *later.token_ids])])

    @property
    def scores(self) -> list[TokenScore]:
        """Of these tokens, if they were asked for. Raises ValueError."""
        return [score for choice in self.choices if choice.logprobs for score in choice.logprobs.scores()]

    @property
    def finish_reason(self) -> FinishReason | None:
        if len(self.choices) == 1:
            return self.choices[0].finish_reason
        return next((choice.finish_reason for choice in self.choices if choice.finish_reason), None)

    @property
    def transfer(self) -> KVTransfer | None:
        """The hand-over, which some servers put beside the choice and others into it."""
        in_choices = (choice.kv_transfer_params for choice in self.choices)
        return self.kv_transfer_params or next((params for params in in_choices if params), None)


class EndedRequest(msgspec.Struct, frozen=True):
    """What a worker has written down of a request, by the name that it has there."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


class EndedRequests(msgspec.Struct, frozen=True):
    """Answer to POST /requests/ended."""

    ended: list[EndedRequest] = []


class Engine(enum.StrEnum):
    """What a worker runs."""

    STRATAKV = "stratakv"
    VLLM = "vllm"


class WorkerFacts(msgspec.Struct, frozen=True):
    """GET /info."""

    worker: str
    epoch: str
    role: WorkerRole
    model: str
    namespace: str
    block_size: int
    max_model_len: int
    dtype: str = "bf16"
    engine: Engine = Engine.STRATAKV
    is_pooled: bool = True
    """Whether its blocks can be in the pool."""
    events: str = ""
    """ZeroMQ endpoint on which it publishes KV events; empty: it does not."""
    replay: str = ""
    """ZeroMQ endpoint at which missed ones can be asked for."""
    hash_algorithm: str = ""
    """How it computes block keys, as far as it tells."""
    hands_over: bool = False
    """Prompts can be handed over, to it and from it, while they are computed."""
    max_running: int = 0
    """Sequences it decodes at once; 0: it does not tell."""
    profile: WorkerProfile = WorkerProfile()
    """What it measured of itself at its start; `stratakv.worker_profile.Curves` draws the curves."""


def is_namespace(text: str) -> bool:
    """Whether a worker's namespace is one."""
    return _NAMESPACE.fullmatch(text) is not None
