"""AIBrix's published rule, to compare with: its requests at their mean prefill, and fixed prices of cached and uncached tokens.

The prices are those of the publication, for one model on one kind of GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from dbnode.scheduler.cost import PREFILL_TOKENS_PER_S_DEFAULT, Candidate, Work
from dbnode.scheduler.policies.base import Stage
from stratakv.settings import RouterPolicy


class AibrixPolicy:
    name = RouterPolicy.AIBRIX
    unit = "ms"
    tie = 0.001
    weighs_roles = False

    def scores(self, candidates: Sequence[Candidate], work: Work, stage: Stage) -> list[float]:
        return [_load_ms(candidate) + _prompt_ms(candidate, work) for candidate in candidates]

    def reason(self, chosen: Candidate, work: Work, stage: Stage) -> str:
        return (
            f"{chosen.running} requests priced {_load_ms(chosen):.0f} ms, {chosen.l1_tokens} of {work.prompt_tokens} tokens"
            f" matched: {_prompt_ms(chosen, work):.0f} ms"
        )


def _load_ms(candidate: Candidate) -> float:
    rate = candidate.prefill_tokens_per_s or PREFILL_TOKENS_PER_S_DEFAULT
    return candidate.running * candidate.sent_tokens_mean / rate * 1000


def _prompt_ms(candidate: Candidate, work: Work) -> float:
    matched = min(candidate.l1_tokens, work.prompt_tokens)
    unmatched = work.prompt_tokens - matched
    return (0.005 * matched + 1) + (0.001 * float(unmatched**1.5) + 5)
