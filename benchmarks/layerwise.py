"""layerwise: how much of a transfer hides behind the computing of a prompt whose history comes over a slow link.

A prompt of about 3,000 tokens of history and 50 new ones, the history's pages on a daemon that is reached over TCP through a
link of 0.25, 0.5, 1 and 2 GB/s (a network namespace of its own, whose loopback device is shaped by tc). Pipelined: each layer
is waited for when it is computed. Whole: computing begins when everything has arrived. Hidden is what pipelining saves, as a
share of what it could save at most: the shorter one of transfer and computing. The engine leaves one core to the transfer.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.dmp import running_daemon
from benchmarks.harness import Spread, parse_options, report
from stratakv.keys import Namespace, block_keys
from stratakv.models import DEFAULT_MODEL, pull
from stratakv.pool.dmp_client import ConnectionCache, TransportKind
from stratakv.pool.pages import PageReader, PageWriter
from stratakv.settings import ModelSettings
from stratakv.wire import PUT_ID_BYTES, Place, Segment
from workers.engine import Engine, EngineConfig, EngineDtype, EngineEvent, EngineRequest, FinishedEvent, SamplingParams
from workers.engine.connector import LoadJob, Tier
from workers.tiers.load import FoundPage, LayerLoad
from workers.tiers.window import windows_of

BLOCK_SIZE = 16
HISTORY_TOKENS = 3008
NEW_TOKENS = 50
NUM_BLOCKS = 256
SEGMENT_BYTES = 128 * 1024 * 1024
GB_PER_S = (0.25, 0.5, 1.0, 2.0)
RUNS, RUNS_QUICK = 15, 3
TIMEOUT_S = 60.0
NAMESPACE = Namespace(b"b" * 16)
_INSIDE = "LAYERWISE_HAS_NAMESPACE"
"""Set in the environment of the part that runs in the namespace."""


def enter_namespace() -> int:
    """Run this program again where the loopback device is its own."""
    if shutil.which("tc") is None or shutil.which("unshare") is None:
        raise SystemExit("layerwise shapes a link with tc and unshare: install iproute2 and util-linux")
    users = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", "--net", *users, sys.executable, "-m", "benchmarks.layerwise", *sys.argv[1:]]
    return subprocess.run(command, env={**os.environ, _INSIDE: "1"}, check=False).returncode


def shape(gb_per_s: float) -> None:
    """Let so much through the loopback device."""
    rate = f"{round(gb_per_s * 8000)}mbit"
    limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "200ms"]
    subprocess.run(["tc", "qdisc", "replace", "dev", "lo", "root", *limit], check=True)


@dataclass(slots=True)
class Hit:
    """The history on the daemon (an ExternalHit)."""

    pages: Sequence[FoundPage]
    start_load: Callable[[Sequence[FoundPage], Sequence[int]], LoadJob]
    start_block: int = 0
    tiers: Sequence[Tier] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tiers = [page.tier for page in self.pages]

    def load(self, first_block: int, l1_blocks: Sequence[int]) -> LoadJob:
        return self.start_load(self.pages[first_block : first_block + len(l1_blocks)], l1_blocks)

    load_ahead = load

    def release(self) -> None:
        """There is no lease."""


class Bench:
    """An engine, and the history's pages on a daemon."""

    def __init__(self, engine: Engine, segment: Segment, rng: random.Random) -> None:
        self._engine = engine
        self._rng = rng
        self._count = 0
        self._layout = engine.model.facts.kv_layout(BLOCK_SIZE)
        self._num_layers = len(self._layout.layers)
        self._open_window = windows_of(engine.kv_cache.k, engine.kv_cache.v)
        self._connections = ConnectionCache(force=TransportKind.TCP)
        self._reader = PageReader(self._layout, NAMESPACE)
        self._threads = ThreadPoolExecutor(1)
        self._history = [rng.randrange(100, 40_000) for _ in range(HISTORY_TOKENS)]
        self.ttft_s(None)
        self.data_bytes = self._layout.data_bytes * (HISTORY_TOKENS // BLOCK_SIZE)
        self._pages = self._write(segment)
        self.transfer_s = 0.0

    def close(self) -> None:
        self._connections.close()
        self._threads.shutdown()

    def _write(self, segment: Segment) -> list[FoundPage]:
        """Put what L1 has of the history into the daemon."""
        keys = block_keys(self._history, BLOCK_SIZE)
        blocks = self._engine.kv_cache.match(keys)
        assert len(blocks) == len(keys), "the history is not in L1"
        deadline, put_id = time.monotonic() + TIMEOUT_S, os.urandom(PUT_ID_BYTES)
        connection = self._connections.get(segment, deadline=deadline)
        extents = connection.allocate(put_id, len(keys), self._layout.page_bytes, TIMEOUT_S, deadline=deadline)
        pages = PageWriter(self._layout, NAMESPACE).begin(connection, put_id, extents, keys)
        pages.write_layers(range(self._num_layers), self._open_window(blocks).memory, deadline=deadline)
        pages.write_headers(deadline=deadline)
        places = [Place(segment.node, extent.offset, extent.generation) for extent in extents]
        return [FoundPage(key, place, segment, Tier.POOL) for key, place in zip(keys, places, strict=True)]

    def ttft_s(self, hit: Hit | None) -> float:
        """Submission to first token of the history and a new message; without a hit, of what L1 has not."""
        self._count += 1
        tokens = self._history + [self._rng.randrange(100, 40_000) for _ in range(NEW_TOKENS)]
        events: queue.Queue[tuple[float, EngineEvent]] = queue.Queue()
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        request = EngineRequest(str(self._count), tokens, sampling, block_keys(tokens, BLOCK_SIZE), external=hit)
        started = time.perf_counter()
        self._engine.submit(request, lambda event: events.put((time.perf_counter(), event)))
        first = 0.0
        while True:
            at, event = events.get(timeout=TIMEOUT_S)
            if isinstance(event, FinishedEvent):
                if event.error is not None:
                    raise event.error
                found = event.usage.tokens_by_tier
                assert self._count == 1 or found.get(Tier.L1 if hit is None else Tier.POOL) == HISTORY_TOKENS, found
                return first - started
            first = first or at

    def in_l1(self) -> float:
        """Computing alone."""
        return self.ttft_s(None)

    def pipelined(self) -> float:
        self._engine.drop_l1()
        return self.ttft_s(Hit(self._pages, self._start))

    def whole(self) -> float:
        """Computing after the transfer, whose time is kept."""
        self._engine.drop_l1()
        return self.ttft_s(Hit(self._pages, self._start_and_wait))

    def _start(self, pages: Sequence[FoundPage], l1_blocks: Sequence[int]) -> LayerLoad:
        load = LayerLoad(
            pages=pages,
            window=self._open_window(l1_blocks),
            num_layers=self._num_layers,
            timeout_s=TIMEOUT_S,
            on_finished=lambda _: None,
        )
        load.start(self._threads, self._reader, self._connections)
        return load

    def _start_and_wait(self, pages: Sequence[FoundPage], l1_blocks: Sequence[int]) -> LayerLoad:
        started = time.perf_counter()
        load = self._start(pages, l1_blocks)
        load.wait_layer(self._num_layers - 1)
        self.transfer_s = time.perf_counter() - started
        return load


def hidden_share(seconds: dict[str, float]) -> float:
    """What pipelining saves, of what it could."""
    could = min(seconds["transfer"], seconds["compute"])
    return round((seconds["whole"] - seconds["pipelined"]) / could, 3)


def measure(bench: Bench, runs: int) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Figures of both sides over the link as it is now, and by how much whole takes longer."""
    times: dict[str, list[float]] = {"pipelined": [], "whole": [], "transfer": [], "compute": []}
    bench.pipelined()
    for run in range(runs):
        times["compute"].append(bench.in_l1())
        arms = [bench.pipelined, bench.whole]
        for arm in arms if run % 2 == 0 else reversed(arms):
            times[arm.__name__].append(arm())
        times["transfer"].append(bench.transfer_s)
    median = {name: float(np.median(values)) for name, values in times.items()}
    best = {name: min(values) for name, values in times.items()}
    spread = {name: Spread.of([value * 1e3 for value in values]).as_json(1) for name, values in times.items()}
    ours = {
        "ttft_ms": spread["pipelined"],
        "hidden_share": hidden_share(median),
        "hidden_share_of_best_runs": hidden_share(best),
        "transfer_gb_per_s": round(bench.data_bytes / median["transfer"] / 1e9, 3),
    }
    baseline = {"ttft_ms": spread["whole"], "transfer_ms": spread["transfer"], "compute_ms": spread["compute"]}
    return ours, baseline, round(median["whole"] / median["pipelined"], 3)


def main() -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        free = max(1, (os.cpu_count() or 2) - 1)
        parser.add_argument("--threads", type=int, default=free, help="of the engine; by default one core is left over")

    options = parse_options(__doc__, add)
    if _INSIDE not in os.environ:
        return enter_namespace()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    model = pull(DEFAULT_MODEL, Path(ModelSettings().cache_dir).expanduser())
    engine = Engine(EngineConfig(model, dtype=EngineDtype.BF16, num_blocks=NUM_BLOCKS, num_threads=options.threads))
    engine.start()
    ours, baseline, ratio = {}, {}, {}
    with running_daemon(SEGMENT_BYTES) as segment:
        bench = Bench(engine, msgspec.json.decode(segment, type=Segment), random.Random(options.seed))
        for gb_per_s in GB_PER_S:
            shape(gb_per_s)
            name = f"{gb_per_s:g}"
            ours[name], baseline[name], ratio[name] = measure(bench, RUNS_QUICK if options.quick else RUNS)
        bench.close()
    engine.shutdown()
    report(
        "layerwise",
        {
            "dtype": "bf16",
            "history_tokens": HISTORY_TOKENS,
            "new_tokens": NEW_TOKENS,
            "engine_threads": options.threads,
            "link_gb_per_s": list(GB_PER_S),
            "mb": round(bench.data_bytes / 1e6, 1),
            "quick": options.quick,
            "seed": options.seed,
        },
        ours,
        baseline,
        {"ttft_whole_over_pipelined": ratio},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
