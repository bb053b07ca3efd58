"""The worker that holds most of the prompt, unless it is little or the load has become uneven; then the one with the least to do.

The rule of SGLang's gateway.
"""

from __future__ import annotations

from collections.abc import Sequence

from dbnode.scheduler.cost import Candidate, Work, backlog_ms
from dbnode.scheduler.policies.base import Stage
from stratakv.settings import RouterPolicy

MATCHED_SHARE_MIN = 0.3
"""A match of less of the prompt is none."""
UNEVEN_REQUESTS = 32
UNEVEN_RATIO = 1.5
"""The load is uneven when the busiest worker has so many requests more than the idlest, and so many times as many."""


class PrefixPolicy:
    name = RouterPolicy.PREFIX
    unit = "ms"
    tie = 1.0
    weighs_roles = False

    def scores(self, candidates: Sequence[Candidate], work: Work, stage: Stage) -> list[float]:
        backlogs = [backlog_ms(candidate) for candidate in candidates]
        best = max(candidate.l1_tokens for candidate in candidates)
        if best < MATCHED_SHARE_MIN * work.prompt_tokens or _is_uneven(candidates):
            return backlogs
        behind = max(backlogs) + self.tie
        return [
            backlog + (0.0 if candidate.l1_tokens == best else behind)
            for candidate, backlog in zip(candidates, backlogs, strict=True)
        ]

    def reason(self, chosen: Candidate, work: Work, stage: Stage) -> str:
        return f"holds {chosen.l1_tokens} of {work.prompt_tokens} tokens, {chosen.queued_tokens} to compute before"


def _is_uneven(candidates: Sequence[Candidate]) -> bool:
    most, least = (pick(candidate.running for candidate in candidates) for pick in (max, min))
    return most - least > UNEVEN_REQUESTS and most > UNEVEN_RATIO * least
