"""How long a request would take on a worker, in milliseconds, from measured rates. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stratakv.wire import WorkerRole
from stratakv.worker_profile import Curves

PREFILL_TOKENS_PER_S_DEFAULT = 500.0
"""Until a worker has measured its own."""
DECODE_STEP_S_DEFAULT = 0.05
POOL_BYTES_PER_S_DEFAULT = 1e9
DECODE_TOKENS_MAX = 64
"""An answer's length is not known beforehand; more than so many tokens are not counted."""
TPOT_MISS_WEIGHT = 10.0
"""What a millisecond counts by which a worker is too slow for the request's class."""
ROLE_MISMATCH_MS = 200.0
"""What a worker of the wrong role must be faster by."""


class Candidate(msgspec.Struct, frozen=True):
    """One live worker as the router sees it for one request."""

    worker: str
    url: str
    role: WorkerRole
    namespace: str
    """Workers of one namespace can read each other's KV."""
    l1_tokens: int
    """Leading prompt tokens that it probably holds itself."""
    pool_tokens: int
    """Leading prompt tokens that are in the pool."""
    queued_tokens: int
    """Prompt tokens it has to compute before this request's, those just sent included."""
    running: int
    """Sequences it is decoding or about to."""
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    pool_bytes_per_s: float = 0.0
    """0 for these three: not measured yet."""
    curves: Curves | None = None
    """What it measured at its start."""
    slowdown: float = 1.0
    """How much longer computing a prompt takes now than the curves say."""
    free_tokens: int | None = None
    """Tokens it has room for beside what it is running; None: not told."""
    held_tokens: int = 0
    """Prompt tokens of all requests that this node has sent it and that have not ended."""
    last_turn: int = 0
    """Which of all requests it was sent last; 0: none yet."""
    sent_tokens_mean: float = 0.0
    """Tokens it had to compute for one request, on average."""


class Work(msgspec.Struct, frozen=True):
    """What the request needs of a worker."""

    prompt_tokens: int
    max_tokens: int
    kv_bytes_per_token: int
    tpot_max_s: float = 0.0
    """A token should not take longer; 0: no matter."""


class Cost(msgspec.Struct, frozen=True):
    """Parts of a score."""

    queue_ms: float
    load_ms: float
    prefill_ms: float
    decode_ms: float
    role_ms: float

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.load_ms + self.prefill_ms + self.decode_ms + self.role_ms


def uncached_tokens(candidate: Candidate, work: Work) -> int:
    """Prompt tokens the worker would compute; one is computed on a full hit too."""
    return max(1, work.prompt_tokens - max(candidate.l1_tokens, candidate.pool_tokens))


def prefill_cost(candidate: Candidate, work: Work, preferred: frozenset[WorkerRole]) -> Cost:
    """Cost up to the first token. Loading is never counted dearer than computing: a worker takes the cheaper."""
    num_loaded = max(0, candidate.pool_tokens - candidate.l1_tokens)
    num_computed = uncached_tokens(candidate, work)
    return Cost(
        queue_ms=_queue_ms(candidate),
        load_ms=min(
            _load_ms(candidate, num_loaded, work.kv_bytes_per_token),
            _compute_ms(candidate, num_loaded, candidate.l1_tokens),
        ),
        prefill_ms=_compute_ms(candidate, num_computed, max(0, work.prompt_tokens - num_computed)),
        decode_ms=_step_ms(candidate) * candidate.running + _room_ms(candidate, work.prompt_tokens),
        role_ms=0.0 if candidate.role in preferred else ROLE_MISMATCH_MS,
    )


def decode_cost(candidate: Candidate, work: Work, preferred: frozenset[WorkerRole]) -> Cost:
    """Cost of an answer whose prompt is computed elsewhere and read from the pool."""
    num_loaded = max(0, work.prompt_tokens - candidate.l1_tokens)
    return Cost(
        queue_ms=_queue_ms(candidate),
        load_ms=_load_ms(candidate, num_loaded, work.kv_bytes_per_token),
        prefill_ms=0.0,
        decode_ms=_step_ms(candidate) * candidate.running
        + _answer_ms(candidate, work)
        + _room_ms(candidate, work.prompt_tokens),
        role_ms=0.0 if candidate.role in preferred else ROLE_MISMATCH_MS,
    )


def whole_cost(candidate: Candidate, work: Work, preferred: frozenset[WorkerRole]) -> Cost:
    """Cost of prompt and answer on one worker."""
    cost = prefill_cost(candidate, work, preferred)
    decode_ms = cost.decode_ms + _answer_ms(candidate, work)
    return Cost(cost.queue_ms, cost.load_ms, cost.prefill_ms, decode_ms, cost.role_ms)


def backlog_ms(candidate: Candidate) -> float:
    """What it has to do already: prompts to compute, sequences to decode."""
    return _queue_ms(candidate) + _step_ms(candidate) * candidate.running


def mean_prefill_ms(candidate: Candidate) -> float:
    """Of the requests that it was sent; 0 while that is not known."""
    return candidate.sent_tokens_mean * 1000 / (candidate.prefill_tokens_per_s or PREFILL_TOKENS_PER_S_DEFAULT)


def forecast_s(candidates: Sequence[Candidate], computed_tokens: int, decode_steps: int, num_at_once: int) -> float:
    """Of many requests, spread evenly: their prompts computed by all workers, their steps shared by `num_at_once`."""
    tokens_per_s = sum(c.prefill_tokens_per_s or PREFILL_TOKENS_PER_S_DEFAULT for c in candidates)
    step_s = sum(_step_ms(c) for c in candidates) / len(candidates) / 1000
    return computed_tokens / tokens_per_s + decode_steps / max(1, num_at_once) * step_s


def _queue_ms(candidate: Candidate) -> float:
    """Of many prompts, at the rate that it had of late."""
    return candidate.queued_tokens * 1000 / (candidate.prefill_tokens_per_s or PREFILL_TOKENS_PER_S_DEFAULT)


def _compute_ms(candidate: Candidate, num_tokens: int, num_cached: int) -> float:
    """Of one prompt, so many tokens behind so many that are cached: by its curves, else at the rate that it had of late."""
    seconds = candidate.curves.prefill_s(num_tokens, num_cached) * candidate.slowdown if candidate.curves else 0.0
    return seconds * 1000 or num_tokens * 1000 / (candidate.prefill_tokens_per_s or PREFILL_TOKENS_PER_S_DEFAULT)


def _load_ms(candidate: Candidate, num_tokens: int, kv_bytes_per_token: int) -> float:
    return num_tokens * kv_bytes_per_token * 1000 / (candidate.pool_bytes_per_s or POOL_BYTES_PER_S_DEFAULT)


def _room_ms(candidate: Candidate, num_tokens: int) -> float:
    """Waiting for others to end where there is no room for so many tokens; an answer's length is not known."""
    if candidate.free_tokens is None or not num_tokens:
        return 0.0
    missing = max(0, num_tokens - candidate.free_tokens) / num_tokens
    return missing * _step_ms(candidate) * DECODE_TOKENS_MAX


def _answer_ms(candidate: Candidate, work: Work) -> float:
    """The steps of the answer, and what they miss the wanted time per token by."""
    step_ms = _step_ms(candidate)
    missed_ms = max(0.0, step_ms - work.tpot_max_s * 1000) if work.tpot_max_s else 0.0
    return (step_ms + TPOT_MISS_WEIGHT * missed_ms) * min(work.max_tokens, DECODE_TOKENS_MAX)


def _step_ms(candidate: Candidate) -> float:
    return (candidate.decode_step_s or DECODE_STEP_S_DEFAULT) * 1000
