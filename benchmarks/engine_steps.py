"""Time of the engine's elementary steps on this machine: prefill, a short turn on a long cached prefix, decode by batch.

Everything goes through the public engine, by requests; prompts are random tokens, so the figures do not depend on the text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import random
import statistics
import sys
import time
from pathlib import Path

from stratakv.keys import block_keys
from stratakv.models import DEFAULT_MODEL, pull
from workers.engine import Engine, EngineConfig, EngineDtype, EngineEvent, EngineRequest, FinishedEvent, SamplingParams

BLOCK_SIZE = 16
NUM_BLOCKS = 2048
HISTORY_TOKENS = 3008
"""3,000 and the rest of its block, so that all of it can be cached."""
TURN_TOKENS = 50
DECODE_PROMPT_TOKENS = 200
DECODE_TOKENS = 40
TIMEOUT_S = 300.0


class Client:
    """Sends requests with ids of its own and collects when their tokens came."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._count = 0

    def send(self, token_ids: list[int], max_tokens: int) -> queue.Queue[tuple[float, EngineEvent]]:
        self._count += 1
        events: queue.Queue[tuple[float, EngineEvent]] = queue.Queue()
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = EngineRequest(str(self._count), token_ids, sampling, block_keys(token_ids, BLOCK_SIZE))
        self._engine.submit(request, lambda event: events.put((time.perf_counter(), event)))
        return events

    def first_token_s(self, token_ids: list[int]) -> float:
        """Time from submission to the first token."""
        start = time.perf_counter()
        return token_times(self.send(token_ids, 1))[0] - start


def token_times(events: queue.Queue[tuple[float, EngineEvent]]) -> list[float]:
    times: list[float] = []
    while True:
        at, event = events.get(timeout=TIMEOUT_S)
        if isinstance(event, FinishedEvent):
            if event.error is not None:
                raise event.error
            return times
        times.append(at)


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(100, 40_000) for _ in range(count)]


def scatter(engine: Engine) -> None:
    """Leave only every other block usable, so that no two blocks of a sequence are neighbours. Before `start`."""
    blocks = engine.kv_cache.allocate(NUM_BLOCKS, None)
    assert blocks is not None
    engine.kv_cache.release(blocks[::2])


def measure_turns(config: EngineConfig, rounds: int, *, scattered: bool) -> dict[str, float]:
    """Medians of a whole prefill of the history, and of a turn when the history is cached."""
    engine, rng = Engine(config), random.Random(1)
    if scattered:
        scatter(engine)
    engine.start()
    client = Client(engine)
    client.first_token_s(random_tokens(rng, 300))
    prefills, turns = [], []
    for _ in range(rounds):
        history = random_tokens(rng, HISTORY_TOKENS)
        prefills.append(client.first_token_s(history))
        turns += [client.first_token_s(history + random_tokens(rng, TURN_TOKENS)) for _ in range(3)]
    engine.shutdown()
    where = "_scattered" if scattered else ""
    return {
        f"prefill_{HISTORY_TOKENS}{where}_s": statistics.median(prefills),
        f"turn_{TURN_TOKENS}_on_{HISTORY_TOKENS}{where}_s": statistics.median(turns),
    }


def measure_decode(config: EngineConfig, batch_sizes: list[int]) -> dict[str, float]:
    """Median time of a decode step by number of sequences."""
    engine, rng, figures = Engine(config), random.Random(2), {}
    engine.start()
    client = Client(engine)
    for batch_size in batch_sizes:
        streams = [
            client.send(random_tokens(rng, DECODE_PROMPT_TOKENS), DECODE_TOKENS + batch_size) for _ in range(batch_size)
        ]
        times = token_times(streams[0])[-DECODE_TOKENS:]
        for stream in streams[1:]:
            token_times(stream)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        figures[f"decode_step_batch_{batch_size}_s"] = statistics.median(gaps)
    engine.shutdown()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", type=EngineDtype, choices=list(EngineDtype), default=EngineDtype.BF16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "stratakv")
    args = parser.parse_args()
    config = EngineConfig(pull(DEFAULT_MODEL, args.cache_dir), dtype=args.dtype, num_blocks=NUM_BLOCKS)
    figures: dict[str, float] = {}
    for scattered in (False, True):
        figures |= measure_turns(config, args.rounds, scattered=scattered)
    figures |= measure_decode(config, [1, 8, 32])
    for name, seconds in figures.items():
        print(f"{name:40} {seconds * 1000:9.1f} ms", file=sys.stderr)
    result = {"benchmark": "engine_steps", "dtype": args.dtype.value, "num_cpus": os.cpu_count()}
    print(json.dumps(result | {name: round(seconds, 5) for name, seconds in figures.items()}))


if __name__ == "__main__":
    main()
