"""What a routing policy is: a score for each worker that could take a request; the least wins. No I/O, no clock, no randomness.

Asked by `dbnode.scheduler.router`, which breaks ties at random.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

from dbnode.scheduler.cost import Candidate, Work
from stratakv.settings import RouterPolicy
from stratakv.wire import WorkerRole


class Stage(enum.Enum):
    """What a worker is wanted for."""

    WHOLE = enum.auto()
    """Prompt and answer."""
    PREFILL = enum.auto()
    """The prompt, to hand it over."""
    DECODE = enum.auto()
    """The answer to a prompt that is computed elsewhere."""

    @property
    def preferred_roles(self) -> frozenset[WorkerRole]:
        return _PREFILL if self is Stage.PREFILL else _DECODE


_PREFILL = frozenset({WorkerRole.PREFILL})
_DECODE = frozenset({WorkerRole.DECODE, WorkerRole.BOTH})


class Policy(Protocol):
    """One rule."""

    @property
    def name(self) -> RouterPolicy: ...

    @property
    def unit(self) -> str:
        """What scores count."""
        ...

    @property
    def tie(self) -> float:
        """Scores that differ by less are the same."""
        ...

    @property
    def weighs_roles(self) -> bool:
        """Whether its scores know of roles; else workers of other roles are only asked when there are no others."""
        ...

    def scores(self, candidates: Sequence[Candidate], work: Work, stage: Stage) -> list[float]:
        """One for each candidate, of which there is at least one."""
        ...

    def reason(self, chosen: Candidate, work: Work, stage: Stage) -> str:
        """Why this one, in words."""
        ...
