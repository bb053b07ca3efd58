"""router: time to first token and hits of a simulated fleet, by routing policy, with and without a pool that all workers share.

The router's own code runs under a virtual clock (`stratakv sim`). Requests come from `--trace`; by default conversations are
generated: shared system prompts, several turns each, in bursts. All policies see the same requests at the same times; runs differ
in the seed of the choice between equals.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Spread, parse_options, report
from benchmarks.router_trace import generated_trace
from dbnode.simulation.report import SimReport
from dbnode.simulation.run import SimSettings, simulate
from dbnode.simulation.trace import TraceRequest, read_trace
from stratakv.settings import RouterPolicy, RouterSettings

WORKERS = 8
PREFILL_TOKENS_PER_S = 7000.0
L1_BLOCKS = 8000
BLOCK_TOKENS = 512
POOL_BYTES_PER_S = 10e9
"""What one worker loads from the pool in the arm that has one; 131,072 bytes per token."""
RUNS, RUNS_QUICK = 3, 1
REQUESTS_QUICK = 4000
OURS = RouterPolicy.COST
ARMS = {"": 0.0, "_l3": POOL_BYTES_PER_S}
"""Suffix of the keys, bandwidth of the pool."""


def main() -> int:
    options = parse_options(__doc__, _add_options)
    trace = read_trace(options.trace, BLOCK_TOKENS) if options.trace is not None else generated_trace(options.seed)
    runs = RUNS
    if options.quick:
        trace, runs = trace[:REQUESTS_QUICK], RUNS_QUICK
    settings = SimSettings(
        workers=WORKERS, block_tokens=BLOCK_TOKENS, prefill_tokens_per_s=PREFILL_TOKENS_PER_S, l1_blocks=L1_BLOCKS
    )
    found = {
        suffix: {policy: _runs(trace, settings, policy, pool, runs) for policy in RouterPolicy}
        for suffix, pool in ARMS.items()
    }
    ours: dict[str, Any] = {}
    baseline: dict[str, Any] = {}
    ratio: dict[str, Any] = {}
    for suffix, reports in found.items():
        ours |= {f"{name}{suffix}": value for name, value in _figures(reports[OURS]).items()}
        others = [policy for policy in RouterPolicy if policy is not OURS]
        baseline |= {f"{policy}{suffix}": _figures(reports[policy]) for policy in others}
        ratio |= {f"ttft_mean_ours_over_{p}{suffix}": _ratio(reports[OURS], reports[p], "ttft_mean_s") for p in others}
        ratio |= {f"ttft_p99_ours_over_{p}{suffix}": _ratio(reports[OURS], reports[p], "ttft_p99_s") for p in others}
    report("router", _settings(options.trace, trace, settings, runs, options.quick), ours, baseline, ratio)
    return 0


def _runs(
    trace: Sequence[TraceRequest], settings: SimSettings, policy: RouterPolicy, pool_bytes_per_s: float, runs: int
) -> list[SimReport]:
    arm = replace(settings, pool_bytes_per_s=pool_bytes_per_s, router=RouterSettings(policy=policy))
    return [simulate(trace, replace(arm, seed=seed)) for seed in range(runs)]


def _figures(reports: Sequence[SimReport]) -> dict[str, Any]:
    names = ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "hit_share", "hit_share_of_infinite", "refused")
    return {name: Spread.of([getattr(found, name) for found in reports]).as_json(4) for name in names}


def _ratio(ours: Sequence[SimReport], theirs: Sequence[SimReport], name: str) -> float:
    medians = (Spread.of([getattr(found, name) for found in side]).median for side in (ours, theirs))
    above, below = medians
    return round(above / below, 4)


def _settings(
    path: Path | None, trace: Sequence[TraceRequest], settings: SimSettings, runs: int, quick: bool
) -> dict[str, Any]:
    prompt_tokens = sum(request.prompt_tokens for request in trace)
    duration_s = trace[-1].at_s - trace[0].at_s
    return {
        "trace": "generated" if path is None else path.name,
        "requests": len(trace),
        "prompt_tokens_per_s": round(prompt_tokens / duration_s),
        "compute_bound_tokens_per_s": round(settings.workers * settings.prefill_tokens_per_s),
        "workers": settings.workers,
        "prefill_tokens_per_s": settings.prefill_tokens_per_s,
        "l1_blocks": settings.l1_blocks,
        "block_tokens": settings.block_tokens,
        "pool_bytes_per_s_l3": POOL_BYTES_PER_S,
        "kv_bytes_per_token": settings.kv_bytes_per_token,
        "runs": runs,
        "quick": quick,
    }


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, help="JSON lines as `stratakv sim` reads them; by default generated")


if __name__ == "__main__":
    sys.exit(main())
