"""The worker with the least to do, whatever it holds: prompts to compute, then sequences to decode."""

from __future__ import annotations

from collections.abc import Sequence

from dbnode.scheduler.cost import Candidate, Work, backlog_ms
from dbnode.scheduler.policies.base import Stage
from stratakv.settings import RouterPolicy


class LeastLoadPolicy:
    name = RouterPolicy.LEAST_LOAD
    unit = "ms"
    tie = 1.0
    weighs_roles = False

    def scores(self, candidates: Sequence[Candidate], work: Work, stage: Stage) -> list[float]:
        return [backlog_ms(candidate) for candidate in candidates]

    def reason(self, chosen: Candidate, work: Work, stage: Stage) -> str:
        return f"least to do: {chosen.queued_tokens} prompt tokens to compute, {chosen.running} requests"
