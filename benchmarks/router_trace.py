"""Requests of a made-up chat service for `benchmarks.router`: conversations of several turns, a few system prompts, bursts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

from dbnode.simulation.trace import BLOCK_TOKENS, TraceRequest
from stratakv.keys import KEY_BYTES, BlockKey

DURATION_S = 1800.0
BURST_S = 2.0
"""Requests arrive together at these intervals."""
CONVERSATIONS = 1500
TURNS_MEAN = 4.0
SYSTEM_PROMPTS = 12
SYSTEM_BLOCKS_MAX = 12
FIRST_TURN_TOKENS_MEDIAN = 6000
FIRST_TURN_SIGMA = 1.2
TURN_TOKENS_MEDIAN = 900
PROMPT_TOKENS_MAX = 120_000
THINK_S_MEAN = 60.0
ANSWER_TOKENS_MEAN = 300


def generated_trace(seed: int = 0) -> list[TraceRequest]:
    """The same for the same seed."""
    rng = random.Random(seed)
    numbers = count()
    systems = [[next(numbers) for _ in range(rng.randint(1, SYSTEM_BLOCKS_MAX))] for _ in range(SYSTEM_PROMPTS)]
    requests = [request for _ in range(CONVERSATIONS) for request in _conversation(rng, rng.choice(systems), numbers)]
    return sorted(requests, key=lambda request: request.at_s)


def _conversation(rng: random.Random, system: list[int], numbers: Iterator[int]) -> Iterator[TraceRequest]:
    blocks = list(system)
    at_s = rng.uniform(0, DURATION_S)
    tokens = len(system) * BLOCK_TOKENS + int(FIRST_TURN_TOKENS_MEDIAN * rng.lognormvariate(0, FIRST_TURN_SIGMA))
    while at_s < DURATION_S and tokens <= PROMPT_TOKENS_MAX:
        answer_tokens = 1 + int(rng.expovariate(1 / ANSWER_TOKENS_MEAN))
        blocks += [next(numbers) for _ in range(tokens // BLOCK_TOKENS - len(blocks))]
        keys = [BlockKey(block.to_bytes(KEY_BYTES, "big")) for block in blocks]
        yield TraceRequest(at_s // BURST_S * BURST_S, tokens, answer_tokens, keys)
        if rng.random() < 1 / TURNS_MEAN:
            return
        at_s += rng.expovariate(1 / THINK_S_MEAN)
        tokens += answer_tokens + int(TURN_TOKENS_MEDIAN * rng.lognormvariate(0, 1))
