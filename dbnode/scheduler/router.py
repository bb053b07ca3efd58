"""Chooses the worker, or the two workers, for one request. Pure: randomness is handed in, so that a simulator can run it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dbnode.scheduler.cost import Candidate, Cost, Work, decode_cost, prefill_cost, uncached_tokens, whole_cost
from stratakv.wire import WorkerRole

TIE_MS = 1.0
"""Scores that differ by less are the same."""

_PREFILL = frozenset({WorkerRole.PREFILL})
_DECODE = frozenset({WorkerRole.DECODE, WorkerRole.BOTH})
_CostFunction = Callable[[Candidate, Work, frozenset[WorkerRole]], Cost]


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes: `worker` alone, or `prefill` first and `worker` for the rest."""

    worker: Candidate
    prefill: Candidate | None
    uncached_tokens: int
    scores_ms: dict[str, float]
    """By worker, for the role it was scored for last."""


def route(
    candidates: Sequence[Candidate], work: Work, split_tokens_min: int, rng: random.Random, *, may_split: bool = True
) -> Decision | None:
    """The cheapest choice; None without candidates. Roles are preferences: any worker can do the whole job."""
    if not candidates:
        return None
    scores: dict[str, float] = {}
    if may_split:
        decision = _split(candidates, work, split_tokens_min, rng, scores)
        if decision is not None:
            return decision
    worker = _cheapest(candidates, work, whole_cost, _DECODE, scores, rng)
    return Decision(worker, None, uncached_tokens(worker, work), scores)


def _split(
    candidates: Sequence[Candidate], work: Work, split_tokens_min: int, rng: random.Random, scores: dict[str, float]
) -> Decision | None:
    """Two workers for a prompt of which nobody holds enough."""
    decoders = [c for c in candidates if c.role in _DECODE]
    if not decoders or min(uncached_tokens(c, work) for c in candidates) < split_tokens_min:
        return None
    decoder = _cheapest(decoders, work, decode_cost, _DECODE, scores, rng)
    prefillers = [c for c in candidates if c.role in _PREFILL and c.namespace == decoder.namespace]
    if not prefillers:
        return None
    prefiller = _cheapest(prefillers, work, prefill_cost, _PREFILL, scores, rng)
    return Decision(decoder, prefiller, uncached_tokens(prefiller, work), scores)


def _cheapest(
    candidates: Sequence[Candidate],
    work: Work,
    cost: _CostFunction,
    preferred: frozenset[WorkerRole],
    scores: dict[str, float],
    rng: random.Random,
) -> Candidate:
    totals = [cost(candidate, work, preferred).total_ms for candidate in candidates]
    scores.update({c.worker: round(total, 3) for c, total in zip(candidates, totals, strict=True)})
    least = min(totals)
    return rng.choice([c for c, total in zip(candidates, totals, strict=True) if total < least + TIE_MS])
