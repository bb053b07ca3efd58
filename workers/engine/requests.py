"""What goes into the engine and what comes out: requests, and the events each of them is answered with."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stratakv.errors import InvalidRequest, StrataError
from stratakv.keys import BlockKey
from workers.engine.connector import ExternalHit, Tier
from workers.engine.reservations import HeldBlocks
from workers.engine.structured import Structure

MAX_LOGPROBS = 20
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 100.0
MAX_BIASES = 1024
MAX_STOP_TOKENS = 128
MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How output tokens are chosen. Raises InvalidRequest for values out of range.

    `temperature` 0 is greedy. With a `seed` the draw for output token i depends on (seed, i) alone, so that another engine
    can continue the request. `logprobs` n reports the chosen token's log-probability and those of the n likeliest, before
    anything else here changes them. Presence and frequency penalties are subtracted for tokens of the output, the
    repetition penalty divides those of prompt and output; `logit_bias` holds (token id, what is added) pairs. What would end the
    answer is not chosen before `min_tokens` tokens; `tells_stop_token` emits the one of `stop_token_ids` that ends it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    tells_stop_token: bool = False

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", "at least 1")
        _require(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        _require(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", "0 (off) or more")
        _require(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        _require(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"0 to {MAX_LOGPROBS}")
        _require(abs(self.presence_penalty) <= MAX_PENALTY, "presence_penalty", f"-{MAX_PENALTY:g} to {MAX_PENALTY:g}")
        _require(
            abs(self.frequency_penalty) <= MAX_PENALTY, "frequency_penalty", f"-{MAX_PENALTY:g} to {MAX_PENALTY:g}"
        )
        _require(
            0.0 < self.repetition_penalty <= MAX_REPETITION_PENALTY,
            "repetition_penalty",
            f"above 0 and at most {MAX_REPETITION_PENALTY:g}",
        )
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "0 to max_tokens")
        _require(len(self.stop_token_ids) <= MAX_STOP_TOKENS, "stop_token_ids", f"at most {MAX_STOP_TOKENS} tokens")
        _require(len(self.logit_bias) <= MAX_BIASES, "logit_bias", f"at most {MAX_BIASES} tokens")
        _require(
            all(abs(bias) <= MAX_BIAS for _, bias in self.logit_bias), "logit_bias", f"-{MAX_BIAS:g} to {MAX_BIAS:g}"
        )

    @property
    def penalizes_output(self) -> bool:
        """Which tokens were generated matters for the next."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def changes_logits(self) -> bool:
        return self.penalizes_output or bool(self.logit_bias) or self.min_tokens > 0


def _require(holds: bool, param: str, what: str) -> None:
    if not holds:
        raise InvalidRequest(f"{param} must be {what}.", param=param)


@dataclass(slots=True)
class EngineRequest:
    """One generation.

    `resume_token_ids` are output tokens another engine has generated already: they count against max_tokens and are not
    emitted again. `keys` are the keys of all full blocks of token_ids + resume_token_ids. `deadline` is on the engine's clock.
    `structure` holds the answer to a form, from after the resumed tokens on; an eos then ends the answer even if ignored.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    keys: list[BlockKey]
    resume_token_ids: list[int] = field(default_factory=list)
    external: ExternalHit | None = None
    deadline: float | None = None
    structure: Structure | None = None
    held: HeldBlocks = HeldBlocks()
    """Blocks of its prompt that were put into L1 ahead of it."""
    cache_salt: str | None = None
    """`keys` were made with it."""
    owner: int = 0
    """Whose the blocks that it fills are; 0: nobody's."""


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One output token. `index` counts output tokens from 0, resumed ones included. Stop tokens are not emitted."""

    request_id: str
    token_id: int
    index: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestUsage:
    """What a request cost. `tokens_by_tier` tells where the KV of its prompt (and resumed) tokens came from."""

    prompt_tokens: int
    generated_tokens: int
    tokens_by_tier: Mapping[Tier, int]
    preemptions: int
    queue_time_s: float
    prefill_time_s: float
    decode_time_s: float


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The last event of a request. `error` is set for every reason but stop and length."""

    request_id: str
    reason: FinishReason
    error: StrataError | None
    usage: RequestUsage
    stop_token_id: int | None = None
    """The token that ended it; counted in `generated_tokens`, not emitted as a TokenEvent."""


EngineEvent = TokenEvent | FinishedEvent
OnEvent = Callable[[EngineEvent], None]
"""Called from the engine's thread; must return at once."""
