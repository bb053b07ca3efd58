"""The bodies of the worker's HTTP face: OpenAI's completions form with token ids and `kv_transfer_params`.

The form is the one a vLLM server speaks, so that either can stand behind the router. Parsing is strict: a field this worker
does not know is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stratakv.errors import InvalidRequest
from stratakv.tenancy.values import OWNER_HEADER
from workers.engine.connector import Tier
from workers.engine.requests import RequestUsage, SamplingParams, TokenEvent
from workers.engine.structured import Form, FormKind

STOP_STRINGS_MAX = 16
STOP_STRING_CHARS_MAX = 1024
CHOICES_MAX = 1000
FORM_CHARS_MAX = 64 * 1024
_OWNER = re.compile(r"[0-9]{1,18}")
LOGPROB_MIN = -9999.0
"""What is told in place of minus infinity, which JSON does not have."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False


class KVTransferParams(msgspec.Struct, frozen=True):
    """How prefill and decode on two workers hand a request over."""

    do_remote_decode: bool = False
    """Asked of a prefill worker: answer once the prompt's blocks can be found in the pool."""
    do_remote_prefill: bool = False
    """Told to a decode worker: another one has computed the prompt."""
    output_token_ids: list[int] = []
    """Generated elsewhere already: counted against max_tokens, not sent again."""
    num_tokens: int = 0
    is_followed: bool = False
    """Told to a prefill worker: the decode worker follows the request; the answer waits for nothing."""
    remote_url: str = ""
    remote_request_id: str = ""
    """Told to a decode worker: the request that it is to follow, and take the first token from."""


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form the answer must have; exactly one of them is given."""

    json: dict[str, Any] | None = None
    """A JSON schema."""
    choice: list[str] | None = None
    regex: str | None = None

    def form(self) -> Form:
        """Raises InvalidRequest that names the field."""
        given = [name for name in FormKind if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"structured_outputs: expected one of {', '.join(FormKind)}, got {len(given)}",
                param="structured_outputs",
            )
        if self.choice is not None and not all(self.choice):
            raise InvalidRequest("structured_outputs.choice: a choice is empty", param="structured_outputs.choice")
        if self.choice is not None and not 0 < len(self.choice) <= CHOICES_MAX:
            raise InvalidRequest(
                f"structured_outputs.choice: expected 1 to {CHOICES_MAX} strings", param="structured_outputs.choice"
            )
        value = self.json if self.json is not None else self.choice
        text = self.regex if self.regex is not None else msgspec.json.encode(value).decode()
        if len(text) > FORM_CHARS_MAX:
            field = f"structured_outputs.{given[0]}"
            raise InvalidRequest(f"{field}: longer than {FORM_CHARS_MAX} characters", param=field)
        return Form(given[0], text)


class CompletionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: list[int] | str
    model: str = ""
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    """Send the token of `stop_token_ids` that ends the answer; text is cut by who asks."""
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    return_tokens_as_token_ids: bool = False
    """Must be true with `logprobs`: text is made of tokens by who asks."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    kv_transfer_params: KVTransferParams | None = None
    request_id: str = ""
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None
    """KV is shared only between requests with the same salt."""
    timeout_s: float | None = None
    """Deadline of the request, counted from its arrival."""
    owner: int = 0
    """Whose its blocks in the pool are; a header says it."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def transfer(self) -> KVTransferParams:
        return self.kv_transfer_params or KVTransferParams()

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
            min_tokens=self.min_tokens,
            tells_stop_token=self.include_stop_str_in_output,
            logprobs=self.logprobs,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple(self.logit_bias.items()),
        )


_decode = msgspec.json.Decoder(CompletionRequest).decode


def owner_of(headers: Mapping[str, str]) -> int:
    """The tenant that a DB node asks for; 0 where nobody says."""
    said = headers.get(OWNER_HEADER, "")
    return int(said) if _OWNER.fullmatch(said) else 0


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises InvalidRequest that names the field."""
    try:
        request = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the request body is not valid: {error}") from None
    stops = request.stop_strings
    if len(stops) > STOP_STRINGS_MAX or any(not 0 < len(s) <= STOP_STRING_CHARS_MAX for s in stops):
        raise InvalidRequest(
            f"stop: at most {STOP_STRINGS_MAX} strings of 1 to {STOP_STRING_CHARS_MAX} characters", param="stop"
        )
    if request.logprobs is not None and not request.return_tokens_as_token_ids:
        raise InvalidRequest(
            "logprobs: only with return_tokens_as_token_ids = true", param="return_tokens_as_token_ids"
        )
    request.sampling()  # raises for values out of range, before any work is done
    return request


def logprobs_body(tokens: Sequence[TokenEvent]) -> dict[str, Any]:
    """OpenAI's logprobs of a completion, with token ids in the place of texts, as vLLM writes them."""
    return {
        "tokens": [_placeholder(token.token_id) for token in tokens],
        "token_logprobs": [_finite(token.logprob or 0.0) for token in tokens],
        "top_logprobs": [
            {_placeholder(top.token_id): _finite(top.logprob) for top in token.top_logprobs} for token in tokens
        ],
    }


def _placeholder(token_id: int) -> str:
    return f"token_id:{token_id}"


def _finite(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN)


def usage_body(usage: RequestUsage) -> dict[str, Any]:
    """OpenAI's usage object, with the prompt's tokens by source beside it."""
    by_tier = {tier.value: usage.tokens_by_tier.get(tier, 0) for tier in Tier}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.prompt_tokens - by_tier[Tier.COMPUTED.value]},
        "stratakv": {
            **by_tier,
            "queue_ms": round(usage.queue_time_s * 1e3, 3),
            "prefill_ms": round(usage.prefill_time_s * 1e3, 3),
            "decode_ms": round(usage.decode_time_s * 1e3, 3),
        },
    }
