"""Chooses the worker, or the two workers, for one request. Pure: randomness is handed in, so that a simulator can run it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from dbnode.scheduler.cost import Candidate, Work, prefill_cost, uncached_tokens
from dbnode.scheduler.policies.base import Policy, Stage
from stratakv.wire import WorkerRole


class Decision(msgspec.Struct, frozen=True):
    """Where a request goes: `worker` alone, or `prefill` first and `worker` for the rest."""

    worker: Candidate
    prefill: Candidate | None
    uncached_tokens: int
    scores: dict[str, float]
    """By worker, for the role it was scored for last; the least wins."""


def route(
    candidates: Sequence[Candidate],
    work: Work,
    policy: Policy,
    split_tokens_min: int,
    rng: random.Random,
    *,
    may_split: bool = True,
) -> Decision | None:
    """The policy's choice; None without candidates. Roles are preferences: any worker can do the whole job."""
    if not candidates:
        return None
    scores: dict[str, float] = {}
    if may_split:
        decision = _split(candidates, work, policy, split_tokens_min, rng, scores)
        if decision is not None:
            return decision
    worker = _least(candidates, work, policy, Stage.WHOLE, rng, scores)
    return Decision(worker, None, uncached_tokens(worker, work), scores)


def _split(
    candidates: Sequence[Candidate],
    work: Work,
    policy: Policy,
    split_tokens_min: int,
    rng: random.Random,
    scores: dict[str, float],
) -> Decision | None:
    """Two workers for a prompt of which nobody holds enough, unless those that prefill have too much to do."""
    decoders = [c for c in candidates if c.role in Stage.DECODE.preferred_roles]
    if len(decoders) == len(candidates) or not decoders:
        return None
    if min(uncached_tokens(c, work) for c in candidates) < split_tokens_min:
        return None
    decoder = _least(decoders, work, policy, Stage.DECODE, rng, scores)
    prefillers = [c for c in candidates if c.role is WorkerRole.PREFILL and c.namespace == decoder.namespace]
    if not prefillers:
        return None
    prefiller = _least(prefillers, work, policy, Stage.PREFILL, rng, scores)
    if _waits_too_long(prefiller, decoder, work):
        return None
    return Decision(decoder, prefiller, uncached_tokens(prefiller, work), scores)


def _waits_too_long(prefiller: Candidate, decoder: Candidate, work: Work) -> bool:
    """Whether the prompt would wait longer for the one than it would hold up, and wait, on the other."""
    there = prefill_cost(prefiller, work, Stage.PREFILL.preferred_roles)
    here = prefill_cost(decoder, work, Stage.PREFILL.preferred_roles)
    num_held_up = max(
        0, decoder.running - prefiller.running
    )  # whose prompts are still to be computed decode nothing yet
    return there.queue_ms > here.queue_ms + here.prefill_ms * num_held_up + here.role_ms


def _least(
    candidates: Sequence[Candidate],
    work: Work,
    policy: Policy,
    stage: Stage,
    rng: random.Random,
    scores: dict[str, float],
) -> Candidate:
    if not policy.weighs_roles:
        candidates = [c for c in candidates if c.role in stage.preferred_roles] or candidates
    found = policy.scores(candidates, work, stage)
    scores.update({c.worker: round(score, 3) for c, score in zip(candidates, found, strict=True)})
    least = min(found) + policy.tie
    return rng.choice([c for c, score in zip(candidates, found, strict=True) if score < least])
