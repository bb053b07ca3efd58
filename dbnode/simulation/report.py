"""What a simulated fleet did, in figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dbnode.simulation.caches import infinite_hit_tokens
from dbnode.simulation.request import SimRequest


@dataclass(frozen=True, slots=True)
class SimReport:
    """Shares are of all prompt tokens of the requests that were served."""

    requests: int
    refused: int
    hit_share: float
    """Not computed: in L1, or loaded from the pool."""
    l1_share: float
    pool_share: float
    infinite_hit_share: float
    """Of one cache without bounds, to which the same prompts come one after another."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float

    @property
    def hit_share_of_infinite(self) -> float:
        return self.hit_share / self.infinite_hit_share if self.infinite_hit_share else 1.0

    def as_json(self) -> dict[str, Any]:
        found = asdict(self) | {"hit_share_of_infinite": self.hit_share_of_infinite}
        return {name: round(value, 4) for name, value in found.items()}

    @classmethod
    def of(cls, num_requests: int, done: Sequence[SimRequest], block_tokens: int) -> SimReport:
        """`done` are those that were served."""
        arrived = sorted(done, key=lambda sim: sim.number)
        prompt_tokens = sum(sim.request.prompt_tokens for sim in done) or 1
        l1_tokens = sum(sim.l1_tokens for sim in done)
        pool_tokens = sum(sim.pool_tokens for sim in done)
        ttfts_s = sorted(sim.first_token_s - sim.request.at_s for sim in done)
        return cls(
            requests=num_requests,
            refused=num_requests - len(done),
            hit_share=(l1_tokens + pool_tokens) / prompt_tokens,
            l1_share=l1_tokens / prompt_tokens,
            pool_share=pool_tokens / prompt_tokens,
            infinite_hit_share=infinite_hit_tokens([sim.request.keys for sim in arrived], block_tokens) / prompt_tokens,
            ttft_mean_s=sum(ttfts_s) / len(ttfts_s) if ttfts_s else 0.0,
            ttft_p50_s=percentile(ttfts_s, 0.5),
            ttft_p99_s=percentile(ttfts_s, 0.99),
        )


def percentile(ascending: Sequence[float], share: float) -> float:
    """The least value that at least this share of all does not exceed; 0 without values."""
    if not ascending:
        return 0.0
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]
