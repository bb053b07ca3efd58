"""What is known of a request while it runs, and what it has used so far. Made by `dbnode.inference` for each request."""

from __future__ import annotations

from dataclasses import dataclass

from dbnode.dispatch import Dispatch
from dbnode.generate import GenerateRequest, PromptTiers, Timings, Usage
from dbnode.tenants.account import Reservation


@dataclass(slots=True)
class Progress:
    """Of one request; its times are those of the DB node's clock."""

    request: GenerateRequest
    started_s: float = 0.0
    first_token_s: float = 0.0
    prompt_tokens: int = 0
    dispatch: Dispatch | None = None
    reservation: Reservation | None = None

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + (len(self.dispatch.output) if self.dispatch else 0)

    def usage(self, now_s: float) -> Usage:
        arrived_s = self.request.arrived_s
        dispatch = self.dispatch
        tiers = dispatch.tiers if dispatch else None
        waited_ms = (self.started_s or now_s) - arrived_s
        if self.request.is_sibling:
            tiers = None
        return Usage(
            prompt_tokens=0 if self.request.is_sibling else self.prompt_tokens,
            completion_tokens=len(dispatch.output) if dispatch else 0,
            tiers=tiers or PromptTiers(),
            timings=Timings(
                ttft_ms=max(0.0, self.first_token_s - arrived_s) * 1e3,
                queue_ms=waited_ms * 1e3 + (dispatch.queue_ms if dispatch else 0.0),
                e2e_ms=(now_s - arrived_s) * 1e3,
            ),
        )
