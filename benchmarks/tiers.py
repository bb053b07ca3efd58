"""tiers: what the tiers below L1 do for a working set that L1 cannot hold.

Conversations of about 1,000 tokens of history are asked again and again, each time with another short message, the popular ones
more often (Zipf). Their histories together are 1, 2, 4 and 8 times what L1 of the two workers holds. The pool's memory is
small, so that colder histories lie on disk (whose reads may come from the kernel's page cache). Two instances, alike but for
the pool, answer the same requests in turns; every history was asked for once before anything is measured.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness import parse_options, report, words
from stratakv.rest_client import RestClient
from stratakv.up.instance import Instance, scratch_instance

HISTORY_WORDS = 960
NEW_WORDS = 20
OUTPUT_TOKENS = 4
CONVERSATIONS_PER_L1 = 6
"""Histories of 1,000 tokens that both L1 together have room for, and for what is asked."""
L1_TOKENS = 3456
"""Of each of the two workers."""
SEGMENT_MIB = 128
"""Of each of the two daemons: 5,700 tokens."""
TIMES_L1, TIMES_L1_QUICK = (1, 2, 4, 8), (1, 3)
DRAWS, DRAWS_QUICK = 40, 16
ZIPF_EXPONENT = 0.9
WORKERS = ("--prefill-workers", "0", "--decode-workers", "2", "--set", f"worker.l1_tokens={L1_TOKENS}")


@dataclass(slots=True)
class Side:
    """One of the two instances, and what it answered for the present working set."""

    client: RestClient
    model: str
    workers: Sequence[str]
    ttft_ms: list[float] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, instance: Instance) -> Side:
        services = instance.state["services"]
        workers = [service["url"] for name, service in services.items() if name.startswith("decode")]
        return cls(RestClient(instance.rest_url), instance.state["model"], workers)

    def ask(self, history: str, new: str) -> None:
        messages = [{"role": "system", "content": history}, {"role": "user", "content": new}]
        answer = self.client.chat(messages, model=self.model, max_tokens=OUTPUT_TOKENS)
        self.ttft_ms.append(answer.ttft_s * 1e3)
        self.tokens.update(answer.tokens_by_tier())

    def forget(self) -> None:
        """What was answered till now is not to be counted."""
        self.ttft_ms.clear()
        self.tokens.clear()

    def figures(self) -> dict[str, Any]:
        total = sum(self.tokens.values())
        percentiles = statistics.quantiles(self.ttft_ms, n=100, method="inclusive")
        return {
            "ttft_ms_p50": round(percentiles[49], 1),
            "ttft_ms_p99": round(percentiles[98], 1),
            "share_by_tier": {tier: round(count / total, 3) for tier, count in self.tokens.items()},
        }

    def decisions(self) -> dict[str, int]:
        """Pages found below L1 since the start, by tier and what was chosen for them."""
        found: Counter[str] = Counter()
        for url in self.workers:
            with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
                for family in text_string_to_metric_families(response.read().decode()):
                    for sample in family.samples:
                        if sample.name == "stratakv_kv_pages_found_total":
                            found[f"{sample.labels['tier']}_{sample.labels['decision']}"] += int(sample.value)
        return dict(sorted(found.items()))


def zipf_draws(count: int, num_conversations: int, rng: random.Random) -> Sequence[int]:
    """Conversations, the first one most often."""
    weights = [1 / (rank + 1) ** ZIPF_EXPONENT for rank in range(num_conversations)]
    return rng.choices(range(num_conversations), weights, k=count)


def measure(
    sides: Sequence[Side], times: Sequence[int], num_draws: int, rng: random.Random
) -> Iterator[list[dict[str, Any]]]:
    """The figures of both sides for each working set, the histories of a smaller one being part of the next."""
    histories: list[str] = []
    order = itertools.cycle([list(sides), list(reversed(sides))])
    for multiple in times:
        new = [words(HISTORY_WORDS, rng) for _ in range(multiple * CONVERSATIONS_PER_L1 - len(histories))]
        for history in new:
            for side in next(order):
                side.ask(history, words(NEW_WORDS, rng))
        histories += new
        # The popular ones are not those that came first.
        popular = rng.sample(histories, len(histories))
        for side in sides:
            side.forget()
        for conversation in zipf_draws(num_draws, len(histories), rng):
            message = words(NEW_WORDS, rng)
            for side in next(order):
                side.ask(popular[conversation], message)
        yield [side.figures() for side in sides]


def main() -> int:
    options = parse_options(__doc__)
    times, num_draws = (TIMES_L1_QUICK, DRAWS_QUICK) if options.quick else (TIMES_L1, DRAWS)
    rng = random.Random(options.seed)
    with (
        scratch_instance(*WORKERS, "--set", f"dmp.segment_bytes={SEGMENT_MIB}MiB", quiet=options.json) as tiered,
        scratch_instance(*WORKERS, "--set", "worker.pool_enabled=false", quiet=options.json) as l1_only,
    ):
        sides = [Side.of(tiered), Side.of(l1_only)]
        names = [f"{multiple}x" for multiple in times]
        figures = dict(zip(names, measure(sides, times, num_draws, rng), strict=True))
        decisions = sides[0].decisions()
    report(
        "tiers",
        {
            "dtype": "bf16",
            "l1_tokens": 2 * L1_TOKENS,
            "pool_memory_mib": 2 * SEGMENT_MIB,
            "history_words": HISTORY_WORDS,
            "new_words": NEW_WORDS,
            "conversations": {
                name: multiple * CONVERSATIONS_PER_L1 for name, multiple in zip(names, times, strict=True)
            },
            "requests": num_draws,
            "zipf_exponent": ZIPF_EXPONENT,
            "quick": options.quick,
            "seed": options.seed,
        },
        {**{name: ours for name, (ours, _) in figures.items()}, "pages_found": decisions},
        {name: baseline for name, (_, baseline) in figures.items()},
        {
            "ttft_p50_l1only_over_ours": {
                name: round(baseline["ttft_ms_p50"] / ours["ttft_ms_p50"], 2)
                for name, (ours, baseline) in figures.items()
            },
            "ttft_p99_l1only_over_ours": {
                name: round(baseline["ttft_ms_p99"] / ours["ttft_ms_p99"], 2)
                for name, (ours, baseline) in figures.items()
            },
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
