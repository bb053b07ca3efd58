"""zero_hit: what prompts that nobody has sent before pay for the cache.

Two instances with one worker each, alike but for the pool, answer unique prompts in interleaved pairs whose order alternates.
The tax is the median over pairs of (time with the pool / time without) − 1, with a bootstrap confidence interval.
"""

from __future__ import annotations

import random
import statistics
import sys

from benchmarks.harness import Spread, parse_options, report, words
from stratakv.rest_client import RestClient
from stratakv.up.instance import scratch_instance

PROMPT_WORDS = 1000
OUTPUT_TOKENS = 16
PAIRS, PAIRS_QUICK = 60, 12
BOOTSTRAP_SAMPLES = 2000
JOINT = ("--prefill-workers", "0", "--decode-workers", "1")


def one_answer(client: RestClient, model: str, prompt: str) -> float:
    """Whole time of a request, seconds."""
    return client.chat([{"role": "user", "content": prompt}], model=model, max_tokens=OUTPUT_TOKENS).total_s


def median_interval(values: list[float], rng: random.Random) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(BOOTSTRAP_SAMPLES))
    return medians[int(0.025 * BOOTSTRAP_SAMPLES)], medians[int(0.975 * BOOTSTRAP_SAMPLES)]


def main() -> int:
    options = parse_options(__doc__)
    rng = random.Random(options.seed)
    num_pairs = PAIRS_QUICK if options.quick else PAIRS
    with (
        scratch_instance(*JOINT, quiet=options.json) as with_pool,
        scratch_instance(*JOINT, "--set", "worker.pool_enabled=false", quiet=options.json) as without_pool,
    ):
        sides = [(RestClient(i.state["rest_url"]), i.state["model"]) for i in (with_pool, without_pool)]
        for client, model in sides:
            one_answer(client, model, words(PROMPT_WORDS, rng))
        ours_s, baseline_s = [], []
        for pair in range(num_pairs):
            times = {}
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                times[side] = one_answer(*sides[side], words(PROMPT_WORDS, rng))
            ours_s.append(times[0])
            baseline_s.append(times[1])
    taxes = [with_pool / without - 1 for with_pool, without in zip(ours_s, baseline_s, strict=True)]
    low, high = median_interval(taxes, rng)
    report(
        "zero_hit",
        {
            "prompt_words": PROMPT_WORDS,
            "output_tokens": OUTPUT_TOKENS,
            "pairs": num_pairs,
            "quick": options.quick,
            "seed": options.seed,
        },
        {
            "tax": round(statistics.median(taxes), 4),
            "tax_interval_95": [round(low, 4), round(high, 4)],
            "request_s": Spread.of(ours_s).as_json(),
        },
        {"request_s": Spread.of(baseline_s).as_json()},
        {"time_with_pool_over_without": round(1 + statistics.median(taxes), 4)},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
