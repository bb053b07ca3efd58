"""The counters that the connector adds to vLLM's metrics, and what of a report each of them counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stratakv.integrations.vllm.orders import StepReport
from stratakv.integrations.vllm.rates import Distance

Counts = dict[str, dict[str, float]]
"""By counter, and by distance; of counters without distances the only one is empty."""


@dataclass(frozen=True, slots=True)
class CounterSpec:
    """One counter."""

    name: str
    """Without `_total`."""
    what: str
    value: Callable[[StepReport], float | Mapping[Distance, float]]
    by_distance: bool = False


COUNTERS = (
    CounterSpec("stratakv_vllm_loads", "Loads of requests that ended, by every rank", lambda r: r.loads),
    CounterSpec("stratakv_vllm_loads_failed", "Those of them of which a block did not come", lambda r: r.failed_loads),
    CounterSpec("stratakv_vllm_tokens_loaded", "Tokens of whole loads", lambda r: r.loaded_tokens, by_distance=True),
    CounterSpec("stratakv_vllm_load_seconds", "Time that whole loads took", lambda r: r.load_s, by_distance=True),
    CounterSpec("stratakv_vllm_blocks_saved", "Blocks written to the pool", lambda r: r.saved_blocks),
    CounterSpec("stratakv_vllm_saves_dropped", "Saves that were left out, too many waited", lambda r: r.dropped_saves),
)


def counted(report: StepReport) -> Counts:
    """What is not zero."""
    counts: Counts = {}
    for counter in COUNTERS:
        value = counter.value(report)
        by_distance = {d.value: n for d, n in value.items()} if isinstance(value, Mapping) else {"": value}
        if any(by_distance.values()):
            counts[counter.name] = by_distance
    return counts


def added(counts: Counts, more: Counts) -> Counts:
    """The sums."""
    both = {name: dict(by_distance) for name, by_distance in counts.items()}
    for name, by_distance in more.items():
        sums = both.setdefault(name, {})
        for distance, count in by_distance.items():
            sums[distance] = sums.get(distance, 0.0) + count
    return both
