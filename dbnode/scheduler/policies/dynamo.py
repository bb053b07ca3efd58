"""Dynamo's published rule, to compare with: tokens to prefill, less a credit for what is cached, plus tokens being decoded."""

from __future__ import annotations

from collections.abc import Sequence

from dbnode.scheduler.cost import Candidate, Work
from dbnode.scheduler.policies.base import Stage
from stratakv.settings import RouterPolicy

POOL_CREDIT = 0.75
"""Of a token that need not be computed but is not in device memory; what the rule gives for host memory."""
PREFILL_SCALE = 1.0
REQUEST_WEIGHT = 0.0


class DynamoPolicy:
    name = RouterPolicy.DYNAMO
    unit = "tokens"
    tie = 0.5
    weighs_roles = False

    def scores(self, candidates: Sequence[Candidate], work: Work, stage: Stage) -> list[float]:
        return [_score(candidate, work) for candidate in candidates]

    def reason(self, chosen: Candidate, work: Work, stage: Stage) -> str:
        return (
            f"{chosen.queued_tokens} tokens queued, {work.prompt_tokens} of the prompt less {_credit(chosen):.0f} of credit,"
            f" {chosen.held_tokens} tokens in hand"
        )


def _score(candidate: Candidate, work: Work) -> float:
    prefill = max(0.0, candidate.queued_tokens + work.prompt_tokens - _credit(candidate))
    decode = candidate.held_tokens + work.prompt_tokens
    return PREFILL_SCALE * prefill + decode + REQUEST_WEIGHT * candidate.running


def _credit(candidate: Candidate) -> float:
    return candidate.l1_tokens + POOL_CREDIT * max(0, candidate.pool_tokens - candidate.l1_tokens)
