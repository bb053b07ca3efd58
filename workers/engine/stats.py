"""Counters of an engine, and the snapshot of them that other threads see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from workers.engine.connector import Tier
from workers.engine.kv_cache import CacheUse
from workers.engine.scheduler import Scheduler
from workers.engine.step import PartOutcome


@dataclass(frozen=True, slots=True)
class EngineStats:
    """State of an engine at the end of a step; the counters only grow."""

    healthy: bool = True
    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_referenced: int = 0
    num_steps: int = 0
    step_time_s: float = 0.0
    """All steps together."""
    prefill_tokens: int = 0
    decode_tokens: int = 0
    load_failures: int = 0
    preemptions: int = 0
    recovered_tokens: Mapping[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    """Tokens that preempted requests had computed, by where their KV came from when they went on."""
    ahead_used_blocks: int = 0
    """Loaded before their request's turn."""
    ahead_dropped_blocks: int = 0
    """Given up before it."""


class StatsKeeper:
    """Owned by the engine's thread; `latest` is replaced as a whole and may be read anywhere."""

    def __init__(self) -> None:
        self.latest = EngineStats()

    def count_step(self, outcomes: Sequence[PartOutcome], duration_s: float) -> None:
        decodes = sum(outcome.part.num_tokens == 1 for outcome in outcomes)
        latest = self.latest
        self.latest = replace(
            latest,
            num_steps=latest.num_steps + 1,
            step_time_s=latest.step_time_s + duration_s,
            prefill_tokens=latest.prefill_tokens + sum(o.part.num_tokens for o in outcomes) - decodes,
            decode_tokens=latest.decode_tokens + decodes,
            load_failures=latest.load_failures + sum(o.load_error is not None for o in outcomes),
        )

    def publish(self, use: CacheUse, scheduler: Scheduler, healthy: bool) -> None:
        self.latest = replace(
            self.latest,
            healthy=healthy,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            preemptions=scheduler.num_preemptions,
            recovered_tokens={tier: scheduler.recovered_tokens[tier] for tier in Tier},
            ahead_used_blocks=scheduler.ahead.num_used,
            ahead_dropped_blocks=scheduler.ahead.num_dropped,
            blocks_total=use.total,
            blocks_free=use.free,
            blocks_referenced=use.referenced,
        )
