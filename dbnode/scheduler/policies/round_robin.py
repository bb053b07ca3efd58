"""Every worker in turn: the one whose last request is the longest ago."""

from __future__ import annotations

from collections.abc import Sequence

from dbnode.scheduler.cost import Candidate, Work
from dbnode.scheduler.policies.base import Stage
from stratakv.settings import RouterPolicy


class RoundRobinPolicy:
    name = RouterPolicy.ROUND_ROBIN
    unit = "turns"
    tie = 0.5
    weighs_roles = False

    def scores(self, candidates: Sequence[Candidate], work: Work, stage: Stage) -> list[float]:
        return [float(candidate.last_turn) for candidate in candidates]

    def reason(self, chosen: Candidate, work: Work, stage: Stage) -> str:
        return "its turn: " + (f"last sent request {chosen.last_turn}" if chosen.last_turn else "sent nothing yet")
