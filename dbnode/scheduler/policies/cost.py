"""The default: the worker on which the request, and those that come behind it, wait least, in milliseconds from measured rates.

What a prompt makes a worker compute delays whoever is sent there next. Nobody is while some worker is idle. The longer the queue of
the idlest one, the more of those who come wait behind it, and the dearer is each token that another worker need not compute.
"""

from __future__ import annotations

from collections.abc import Sequence

from dbnode.scheduler.cost import Candidate, Cost, Work, decode_cost, mean_prefill_ms, prefill_cost, whole_cost
from dbnode.scheduler.policies.base import Stage
from stratakv.settings import RouterPolicy

TIE_MS = 1.0
FOLLOWERS_PER_WAITING = 2.0
"""Requests that will wait behind this one, for each that waits at the idlest worker."""
FOLLOWERS_MAX = 4.0

_COSTS = {Stage.WHOLE: whole_cost, Stage.PREFILL: prefill_cost, Stage.DECODE: decode_cost}


class CostPolicy:
    name = RouterPolicy.COST
    unit = "ms"
    tie = TIE_MS
    weighs_roles = True

    def scores(self, candidates: Sequence[Candidate], work: Work, stage: Stage) -> list[float]:
        costs = [_cost(candidate, work, stage) for candidate in candidates]
        followers = _followers(candidates, costs)
        return [cost.total_ms + followers * cost.prefill_ms for cost in costs]

    def reason(self, chosen: Candidate, work: Work, stage: Stage) -> str:
        cost = _cost(chosen, work, stage)
        parts = (
            (cost.queue_ms, "waiting"),
            (cost.load_ms, "loading"),
            (cost.prefill_ms, "computing"),
            (cost.decode_ms, "decoding"),
            (cost.role_ms, "for its role"),
        )
        return " + ".join(f"{ms:.0f} ms {what}" for ms, what in parts if ms >= 0.5) or "nothing to wait for"


def _cost(candidate: Candidate, work: Work, stage: Stage) -> Cost:
    return _COSTS[stage](candidate, work, stage.preferred_roles)


def _followers(candidates: Sequence[Candidate], costs: Sequence[Cost]) -> float:
    mean_ms = sum(map(mean_prefill_ms, candidates)) / len(candidates)
    if not mean_ms:
        return 0.0
    return min(FOLLOWERS_MAX, FOLLOWERS_PER_WAITING * min(cost.queue_ms for cost in costs) / mean_ms)
