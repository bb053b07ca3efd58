"""vllm_connector: the same vLLM with and without StrataKV's connector, on the pinned chat workload.

Eight conversations with 3,000 tokens of history take turns: 50 tokens in, 64 out. vLLM's own cache holds 8,192 tokens, so that a
conversation's history is evicted before its next turn. Both engines run side by side, are configured alike and are asked in
turns. Three parts: single requests (time to first token), all conversations at once (throughput), and prompts that nobody has
seen before (what the connector costs when there is nothing to find).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Spread, parse_options, report, words
from benchmarks.kv_pool import kv_pool
from benchmarks.vllm_process import BLOCK_SIZE, Completion, VllmProcess, connector_config, vllm_engine
from stratakv import models
from stratakv.models import DEFAULT_MODEL
from stratakv.settings import ModelSettings
from stratakv.text import load_tokenizer

HISTORY_TOKENS = 3000
NEW_TOKENS = 50
OUTPUT_TOKENS = 64
L1_TOKENS = 8192
CONVERSATIONS, CONVERSATIONS_QUICK = 8, 5
ROUNDS, ROUNDS_QUICK = 5, 1
"""After the first one, in which both sides compute everything."""
UNIQUE, UNIQUE_QUICK = 9, 2
LOADED_PASSES, LOADED_PASSES_QUICK = 3, 1
SETTLE_S = 0.3
"""Between requests of the two sides: what one still does must not slow the other."""
SEGMENT = "1536MiB"


class Prompts:
    """Random words, cut to a number of tokens."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._tokenizer = load_tokenizer(directory)
        self._rng = random.Random(seed)

    def tokens(self, count: int) -> list[int]:
        return list(self._tokenizer.encode(words(2 * count, self._rng)))[:count]


@dataclass(slots=True)
class Side:
    """One of the two engines, its conversations so far, and what it measured."""

    engine: VllmProcess
    conversations: list[list[int]]
    ttft_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    unique_ms: list[float] = field(default_factory=list)
    cached: int = 0
    asked: int = 0

    def turn(self, number: int, new: Sequence[int]) -> Completion:
        """The next turn of one conversation."""
        history = self.conversations[number]
        history += new
        answer = self.engine.generate([history], OUTPUT_TOKENS)[0]
        if answer.outcome != "whole":
            raise SystemExit(f"vLLM failed: {answer.outcome}")
        self.asked += len(history)
        self.cached += answer.cached_tokens
        history += answer.token_ids
        return answer

    def turns_at_once(self, news: Sequence[Sequence[int]]) -> None:
        """One turn of every conversation, all sent at the same moment."""
        began = time.monotonic()
        threads = [threading.Thread(target=self.turn, args=turn) for turn in enumerate(news)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.tokens_per_s.append(len(news) * OUTPUT_TOKENS / (time.monotonic() - began))

    def figures(self) -> dict[str, object]:
        return {
            "ttft_ms": Spread.of(self.ttft_ms).as_json(1),
            "output_tokens_per_s": Spread.of(self.tokens_per_s).as_json(1),
            "unique_ttft_ms": Spread.of(self.unique_ms).as_json(1),
            "cached_share": round(self.cached / self.asked, 3),
        }


def measure(sides: Mapping[str, Side], prompts: Prompts, options: argparse.Namespace) -> None:
    """All three parts."""
    in_turns = list(sides.values())
    ask_unique(in_turns, prompts)
    for side in in_turns:
        side.unique_ms.clear()
    for _ in range(UNIQUE_QUICK if options.quick else UNIQUE):
        ask_unique(in_turns, prompts)
        in_turns.reverse()
    for round_number in range(1 + (ROUNDS_QUICK if options.quick else ROUNDS)):
        for number in range(len(in_turns[0].conversations)):
            new = prompts.tokens(NEW_TOKENS)
            for side in in_turns:
                answer = side.turn(number, new)
                if round_number:
                    side.ttft_ms.append(answer.ttft_s * 1e3)
                time.sleep(SETTLE_S)
            in_turns.reverse()
    for _ in range(LOADED_PASSES_QUICK if options.quick else LOADED_PASSES):
        news = [prompts.tokens(NEW_TOKENS) for _ in in_turns[0].conversations]
        for side in in_turns:
            side.turns_at_once(news)
            time.sleep(SETTLE_S)
        in_turns.reverse()


def ask_unique(sides: Sequence[Side], prompts: Prompts) -> None:
    """A prompt that is nowhere, of its own for each side: one of them must not find what the other wrote."""
    for side in sides:
        answer = side.engine.generate([prompts.tokens(HISTORY_TOKENS)], 1)[0]
        side.unique_ms.append(answer.ttft_s * 1e3)
        time.sleep(SETTLE_S)


def main() -> int:
    options = parse_options(__doc__)
    directory = models.pull(DEFAULT_MODEL, ModelSettings().cache_dir.expanduser())
    prompts = Prompts(directory, options.seed)
    histories = [prompts.tokens(HISTORY_TOKENS) for _ in range(CONVERSATIONS_QUICK if options.quick else CONVERSATIONS)]
    arguments: dict[str, Any] = {
        "model": str(directory),
        "dtype": "bfloat16",
        "max_model_len": 6144,
        "num_gpu_blocks_override": 1 + L1_TOKENS // BLOCK_SIZE,
    }
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stratakv-bench-")))
        port = stack.enter_context(kv_pool(scratch, SEGMENT))
        config = connector_config(port)
        plain = stack.enter_context(vllm_engine(scratch, "plain", **arguments))
        ours = stack.enter_context(vllm_engine(scratch, "connector", kv_transfer_config=config, **arguments))
        sides = {"baseline": Side(plain, [[*h] for h in histories]), "ours": Side(ours, [[*h] for h in histories])}
        measure(sides, prompts, options)
    told = {name: side.figures() for name, side in sides.items()}
    medians = {
        name: [Spread.of(v).median for v in (s.ttft_ms, s.tokens_per_s, s.unique_ms)] for name, s in sides.items()
    }
    ttft, rate, unique = zip(medians["baseline"], medians["ours"], strict=True)
    report(
        "vllm_connector",
        {
            "model": DEFAULT_MODEL,
            "dtype": "bf16",
            "block_size": BLOCK_SIZE,
            "l1_tokens": L1_TOKENS,
            "conversations": len(histories),
            "history_tokens": HISTORY_TOKENS,
            "new_tokens": NEW_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "quick": options.quick,
            "seed": options.seed,
        },
        told["ours"],
        told["baseline"],
        {
            "ttft_plain_over_connector_p50": round(ttft[0] / ttft[1], 2),
            "throughput_connector_over_plain": round(rate[1] / rate[0], 3),
            "zero_hit_tax": round(unique[1] / unique[0] - 1, 4),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
