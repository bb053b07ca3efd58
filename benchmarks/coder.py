"""coder: one long history, as an agent that works on a code base has, against vLLM.

One conversation of 7,500 tokens, 30 in and 32 out, 10 rounds. Between two turns another conversation of the same length passes
through, so that the engine's own cache, which holds one of them, loses the first. Arms: vLLM, and StrataKV.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.conversations import Arm, Figures, Texts, Workload, one_by_one, strata_arm, vllm_arm
from benchmarks.harness import Spread, parse_options, report
from stratakv import models
from stratakv.models import DEFAULT_MODEL
from stratakv.settings import ModelSettings

WORKLOAD = Workload(conversations=2, history=7500, new=30, output=32, l1_tokens=8192, max_model_len=8192)
POOL_MIB = 1024
ROUNDS, ROUNDS_QUICK = 10, 2


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=None, help=f"turns of each conversation, {ROUNDS} by default")


def main() -> int:
    options = parse_options(__doc__, add_options)
    rounds = options.rounds or (ROUNDS_QUICK if options.quick else ROUNDS)
    model = models.pull(DEFAULT_MODEL, ModelSettings().cache_dir.expanduser())
    texts = Texts(model, options.seed)
    histories = [texts.text(WORKLOAD.history) for _ in range(WORKLOAD.conversations)]
    vllm, ours = Figures(), Figures()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stratakv-bench-")))
        baseline = stack.enter_context(vllm_arm(scratch, "vllm", model, texts, histories, WORKLOAD, WORKLOAD.l1_tokens))
        instance = stack.enter_context(strata_arm(histories, WORKLOAD, f"dmp.segment_bytes={POOL_MIB}MiB"))
        sides: list[tuple[Arm, Figures]] = [(baseline, vllm), (instance, ours)]
        one_by_one(sides, texts, WORKLOAD, keep=False)
        for _ in range(rounds):
            one_by_one(sides, texts, WORKLOAD)
        tokens_by_tier = dict(instance.tokens_by_tier)
    report(
        "coder",
        {
            "model": DEFAULT_MODEL,
            "dtype": "bf16",
            "rounds": rounds,
            "history_tokens": WORKLOAD.history,
            "new_tokens": WORKLOAD.new,
            "output_tokens": WORKLOAD.output,
            "l1_tokens": WORKLOAD.l1_tokens,
            "pool_mib": POOL_MIB,
            "quick": options.quick,
            "seed": options.seed,
        },
        ours.as_json() | {"tokens": tokens_by_tier},
        vllm.as_json(),
        {"ttft_vllm_over_ours_p50": round(Spread.of(vllm.unloaded_ms).median / Spread.of(ours.unloaded_ms).median, 2)},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
