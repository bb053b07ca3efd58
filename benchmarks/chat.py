"""chat: conversations whose histories together are several times what the engine's own cache holds, against vLLM.

Eight conversations of 3,000 tokens take turns, 50 tokens in and 64 out; the engine's cache holds 8,192 tokens on every side.
Arms, in one run: vLLM; vLLM with room for every history; StrataKV without its lower tiers; StrataKV whose worker reaches the pool
over TCP; StrataKV. Each turn is measured alone (unloaded), then all conversations at once (throughput), then turns that arrive
at random at 0.8 of the rate that vLLM by itself can take (loaded).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from benchmarks.conversations import (
    Arm,
    Figures,
    Texts,
    Workload,
    all_at_once,
    by_poisson,
    one_by_one,
    p99,
    strata_arm,
    vllm_arm,
)
from benchmarks.harness import Spread, note, parse_options, report
from stratakv import models
from stratakv.models import DEFAULT_MODEL
from stratakv.settings import ModelSettings

WORKLOAD = Workload(conversations=8, history=3000, new=50, output=64, l1_tokens=8192, max_model_len=6144)
POOL_MIB = 1536
POOL_TOKENS = 65536
"""What that memory holds, for the vLLM that is given all of it: 23,040 bytes a token."""
ROUNDS, ROUNDS_QUICK = 10, 3
"""Of which one is for warming up, and one each is for throughput and load at least."""
LOAD = 0.8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=None, help=f"turns of each conversation, {ROUNDS} by default")


def main() -> int:
    options = parse_options(__doc__, add_options)
    rounds = options.rounds or (ROUNDS_QUICK if options.quick else ROUNDS)
    model = models.pull(DEFAULT_MODEL, ModelSettings().cache_dir.expanduser())
    texts = Texts(model, options.seed)
    histories = [texts.text(WORKLOAD.history) for _ in range(WORKLOAD.conversations)]
    names = ("vllm", "bigger_vllm", "l1_only", "ours_tcp", "ours")
    figures = {name: Figures() for name in names}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stratakv-bench-")))
        starting: list[AbstractContextManager[Arm]] = [
            vllm_arm(scratch, "vllm", model, texts, histories, WORKLOAD, WORKLOAD.l1_tokens),
            vllm_arm(scratch, "bigger", model, texts, histories, WORKLOAD, WORKLOAD.l1_tokens + POOL_TOKENS),
            strata_arm(histories, WORKLOAD, "worker.pool_enabled=false"),
            strata_arm(histories, WORKLOAD, f"dmp.segment_bytes={POOL_MIB}MiB", "pool.shared_memory=false"),
            strata_arm(histories, WORKLOAD, f"dmp.segment_bytes={POOL_MIB}MiB"),
        ]
        arms = [stack.enter_context(arm) for arm in starting]
        note("all arms are ready")
        sides = list(zip(arms, figures.values(), strict=True))
        one_by_one(sides, texts, WORKLOAD, keep=False)
        note("warmed up")
        unloaded = max(1, (rounds - 2) // 3)
        for _ in range(unloaded):
            one_by_one(sides, texts, WORKLOAD)
            note("a turn of each conversation, alone")
        rates = [all_at_once(arm, kept, texts, WORKLOAD) for arm, kept in sides]
        rate = LOAD * rates[0]
        turns = max(1, rounds - 2 - unloaded) * WORKLOAD.conversations
        rng = random.Random(options.seed)
        gaps_s = [rng.expovariate(rate) for _ in range(turns)]
        for arm, kept in sides:
            by_poisson(arm, kept, texts, WORKLOAD, gaps_s)
            note(f"{turns} turns under load")
    ours, vllm, bigger = figures["ours"], figures["vllm"], figures["bigger_vllm"]
    report(
        "chat",
        {
            "model": DEFAULT_MODEL,
            "dtype": "bf16",
            "conversations": WORKLOAD.conversations,
            "rounds": rounds,
            "history_tokens": WORKLOAD.history,
            "new_tokens": WORKLOAD.new,
            "output_tokens": WORKLOAD.output,
            "l1_tokens": WORKLOAD.l1_tokens,
            "pool_mib": POOL_MIB,
            "turns_per_s": round(rate, 3),
            "quick": options.quick,
            "seed": options.seed,
        },
        {name: figures[name].as_json() for name in ("ours", "ours_tcp", "l1_only")},
        {name: figures[name].as_json() for name in ("vllm", "bigger_vllm")},
        {
            "ttft_vllm_over_ours_p50": over(vllm.loaded_ms, ours.loaded_ms),
            "ttft_vllm_over_ours_p99": round(p99(vllm.loaded_ms) / p99(ours.loaded_ms), 2),
            "ttft_unloaded_vllm_over_ours_p50": over(vllm.unloaded_ms, ours.unloaded_ms),
            "throughput_ours_over_vllm": over(ours.tokens_per_s, vllm.tokens_per_s),
            "ttft_bigger_vllm_over_ours_p50": over(bigger.loaded_ms, ours.loaded_ms),
        },
    )
    return 0


def over(numerator: list[float], denominator: list[float]) -> float:
    return round(Spread.of(numerator).median / Spread.of(denominator).median, 2)


if __name__ == "__main__":
    sys.exit(main())
