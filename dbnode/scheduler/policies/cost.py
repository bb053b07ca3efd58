"""The default: the worker on which the request, and those behind it, wait least, in milliseconds from measured rates."""

from __future__ import annotations

from collections.abc import Sequence

from dbnode.scheduler.cost import Candidate, Cost, Work, decode_cost, prefill_cost, whole_cost
from dbnode.scheduler.policies.base import Stage
from stratakv.settings import RouterPolicy

TIE_MS = 1.0

_COSTS = {Stage.WHOLE: whole_cost, Stage.PREFILL: prefill_cost, Stage.DECODE: decode_cost}


class CostPolicy:
    name = RouterPolicy.COST
    unit = "ms"
    tie = TIE_MS
    weighs_roles = True

    def scores(self, candidates: Sequence[Candidate], work: Work, stage: Stage) -> list[float]:
        return [_cost(candidate, work, stage).total_ms for candidate in candidates]

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
