"""chat_warm: time to first token of one conversation's next turn, nothing cached against everything in the pool.

A conversation has about 3,000 tokens of history and a new message of about 50. Cold: its prefix is nowhere. Warm: the
workers hold nothing (L1 and L2 are dropped), the history's blocks lie in the segment of the other worker's daemon. A REST
client measures from sending the request to the first token. Both sides run on the same processes, interleaved.
"""

from __future__ import annotations

import random
import sys

from benchmarks.harness import Spread, parse_options, report, words
from stratakv.rest_client import Answer, Messages, RestClient
from stratakv.up.instance import scratch_instance

HISTORY_WORDS = 2960
NEW_WORDS = 44
RUNS, RUNS_QUICK = 9, 3
OUTPUT_TOKENS = 4


def conversation(history: str, new: str) -> Messages:
    return [{"role": "system", "content": history}, {"role": "user", "content": new}]


def one_pair(client: RestClient, model: str, rng: random.Random) -> tuple[Answer, Answer]:
    """The same history cold, then warm with another new message."""
    history = words(HISTORY_WORDS, rng)
    answers = []
    for _ in range(2):
        answers.append(client.chat(conversation(history, words(NEW_WORDS, rng)), model=model, max_tokens=OUTPUT_TOKENS))
        client.post("/admin/cache/drop", {"tiers": ["l1", "l2"]})
    cold, warm = answers
    if cold.tokens_by_tier()["computed"] < HISTORY_WORDS or warm.tokens_by_tier()["pool"] < HISTORY_WORDS // 2:
        raise SystemExit(f"not cold and warm: {cold.tokens_by_tier()} then {warm.tokens_by_tier()}")
    return cold, warm


def main() -> int:
    options = parse_options(__doc__)
    runs = RUNS_QUICK if options.quick else RUNS
    rng = random.Random(options.seed)
    with scratch_instance("--set", "worker.dtype=bf16", quiet=options.json) as instance:
        state = instance.state
        client = RestClient(state["rest_url"])
        one_pair(client, state["model"], rng)
        pairs = [one_pair(client, state["model"], rng) for _ in range(runs)]
        client.close()
    cold = Spread.of([c.ttft_s * 1e3 for c, _ in pairs])
    warm = Spread.of([w.ttft_s * 1e3 for _, w in pairs])
    report(
        "chat_warm",
        {
            "dtype": "bf16",
            "history_words": HISTORY_WORDS,
            "new_words": NEW_WORDS,
            "quick": options.quick,
            "seed": options.seed,
        },
        {"ttft_ms": warm.as_json(1), "tokens": pairs[-1][1].tokens_by_tier()},
        {"ttft_ms": cold.as_json(1), "tokens": pairs[-1][0].tokens_by_tier()},
        {"ttft_cold_over_warm": round(cold.median / warm.median, 2)},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
