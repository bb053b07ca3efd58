"""A request of a trace while it is replayed; `dbnode.simulation.report` makes the figures of what these have become."""

from __future__ import annotations

from dataclasses import dataclass

from dbnode.scheduler.fleet import Sent
from dbnode.simulation.trace import TraceRequest


@dataclass(slots=True)
class SimRequest:
    """One request on its way."""

    number: int
    """In the trace."""
    request: TraceRequest
    sent: Sent
    l1_tokens: int = 0
    pool_tokens: int = 0
    estimated_tokens: int = 0
    """What it was thought to have to compute when it arrived at the worker."""
    first_token_s: float = 0.0
