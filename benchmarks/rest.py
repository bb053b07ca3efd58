"""rest: what the DB node's REST face adds to a worker: time to first token, time of each token, requests per second.

The worker is a stand-in without a model (`benchmarks.rest_worker`), which sends a token to every stream each 25 ms and remembers
when. Streamed chats go through a DB node (without PostgreSQL); the baseline is the same worker asked alone for the same, in
turn, in the same run. Worker, DB node and clients are a process each. `added_per_token_ms` compares the time between the
worker's sending of a token and the client's receiving it, and `requests_per_s` counts answers of 8 tokens that are not paced.
`cpu_us_per_request` and `cpu_us_per_token` are processor time of the face: of such an answer, and of each token that is paced.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.harness import Spread, parse_options, report, words
from benchmarks.rest_client import Answer, Client, Face
from benchmarks.rest_worker import NO_BEAT_SEED, STEP_S
from dbnode.node import Node
from stratakv.http_server import HttpServer
from stratakv.models import DEFAULT_MODEL, pull, resolve
from stratakv.process import started
from stratakv.settings import ModelSettings, RestSettings, RouterSettings, Settings, WorkerAddress
from stratakv.text import encode, load_tokenizer

STREAMS = (1, 32, 256)
HEADLINE_STREAMS = 32
TOKENS, TOKENS_UNPACED = 40, 8
SECONDS, SECONDS_QUICK = 4.0, 1.5
RUNS, RUNS_QUICK = 3, 1
START_TIMEOUT_S = 60.0
PROMPT_WORDS = 64
TOKEN_TEXT = " the"
THINK_S_MAX = 0.5
"""A client waits up to so long before its next paced request, so that requests do not come all at once."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one measurement found, in milliseconds."""

    ttft_p50: float
    ttft_p99: float
    token_p50: float
    token_p99: float
    requests_per_s: float
    cpu_us_per_request: float
    cpu_us_per_token: float


Cells = dict[str, dict[int, list[Cell]]]
"""By face and number of streams."""


class Bench:
    """Asks one face with a number of streams at once."""

    def __init__(self, token_ids: list[int], seed: int, worker_port: int) -> None:
        self._token_ids = token_ids
        self._rng = random.Random(seed)
        self._worker_port = worker_port
        self._number = 0

    async def cell(self, face: Face, streams: int, seconds: float) -> Cell:
        await self._sent()
        began_cpu_s = _cpu_s(face.pid)
        paced = await self._run(face, streams, seconds, TOKENS, None)
        paced_cpu_us = 1e6 * (_cpu_s(face.pid) - began_cpu_s) / len(paced)
        sent = await self._sent()
        delays = sorted(delay for answer in paced for delay in _delays(answer, sent))
        ttfts = sorted(answer.received_s[0] - answer.asked_s for answer in paced)
        began_s, began_cpu_s = time.monotonic(), _cpu_s(face.pid)
        unpaced = await self._run(face, streams, seconds / 2, TOKENS_UNPACED, NO_BEAT_SEED)
        rate = len(unpaced) / (time.monotonic() - began_s)
        request_cpu_us = 1e6 * (_cpu_s(face.pid) - began_cpu_s) / len(unpaced)
        token_cpu_us = (paced_cpu_us - request_cpu_us) / (TOKENS - 1)
        ranks = _rank(ttfts, 0.5), _rank(ttfts, 0.99), _rank(delays, 0.5), _rank(delays, 0.99)
        return Cell(*ranks, rate, request_cpu_us, token_cpu_us)

    async def _run(self, face: Face, streams: int, seconds: float, num_tokens: int, seed: int | None) -> list[Answer]:
        loop, answers = asyncio.get_running_loop(), list[Answer]()
        until_s = time.monotonic() + seconds

        async def stream(number: int) -> None:
            _, client = await loop.create_connection(Client, "127.0.0.1", face.port)
            await asyncio.sleep(STEP_S * number / streams)
            while time.monotonic() < until_s:
                if seed is None:
                    await asyncio.sleep(self._rng.random() * THINK_S_MAX)
                self._number += 1
                name = f"n{self._number}" if face.name == "alone" else ""
                text = words(PROMPT_WORDS, self._rng)
                answers.append(await client.ask(face, face.body(text, self._token_ids, name, num_tokens, seed), name))
            client.close()

        async with asyncio.TaskGroup() as tasks:
            for number in range(streams):
                tasks.create_task(stream(number))
        assert all(len(answer.received_s) == num_tokens for answer in answers), "an answer was not whole"
        return answers

    async def _sent(self) -> dict[str, list[float]]:
        """When the worker sent what it sent since the last time."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._worker_port)
        writer.write(b"GET /sent HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        sent: dict[str, list[float]] = json.loads(await reader.readexactly(size))
        writer.close()
        # A DB node adds the number of the attempt to its own name of the request.
        return {
            name.rpartition("-")[0] if name.startswith("chatcmpl-") else name: times for name, times in sent.items()
        }


def _delays(answer: Answer, sent: dict[str, list[float]]) -> Iterator[float]:
    for received_s, sent_s in zip(answer.received_s, sent[answer.name], strict=True):
        yield received_s - sent_s


def _cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def _rank(ordered: list[float], share: float) -> float:
    """In milliseconds."""
    return 1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def measured(options: argparse.Namespace, token_ids: list[int], worker: Child, node: Child) -> Cells:
    """Cells of each run."""
    seconds = SECONDS_QUICK if options.quick else SECONDS
    runs = options.runs or (RUNS_QUICK if options.quick else RUNS)
    faces = [
        Face("ours", node.port, node.pid, "/v1/chat/completions", TOKEN_TEXT.encode()),
        Face("alone", worker.port, worker.pid, "/v1/completions", b'"finish_reason":null'),
    ]
    bench = Bench(token_ids, options.seed, worker.port)
    found: Cells = {face.name: {} for face in faces}
    for face in faces:
        await bench.cell(face, 1, 0.5)  # first requests open connections and fill caches
    for run in range(runs):
        for streams in options.streams:
            for face in faces if run % 2 == 0 else reversed(faces):
                cell = await bench.cell(face, streams, seconds)
                found[face.name].setdefault(streams, []).append(cell)
                if not options.json:
                    print(f"{face.name:6} {streams:4} streams: {cell}", flush=True)
    return found


@dataclass(frozen=True, slots=True)
class Child:
    """A process of ours that listens."""

    port: int
    pid: int


@contextmanager
def running() -> Iterator[tuple[list[int], Child, Child]]:
    """A worker and a DB node in front of it, and a prompt for the worker."""
    cache_dir = ModelSettings().cache_dir.expanduser()
    pull(DEFAULT_MODEL, cache_dir)
    token_ids = encode(load_tokenizer(resolve(DEFAULT_MODEL, cache_dir)), TOKEN_TEXT * PROMPT_WORDS, special=False)
    with (
        child("benchmarks.rest_worker", str(token_ids[-1]), DEFAULT_MODEL) as worker,
        child("benchmarks.rest", "--serve-node", str(worker.port)) as node,
    ):
        yield token_ids, worker, node


@contextmanager
def child(module: str, *args: str) -> Iterator[Child]:
    """Runs a module that prints its port when it is ready."""
    command = [sys.executable, "-m", module, *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.strip().isdigit():
                raise SystemExit(f"{module} did not start")
            yield Child(int(line), process.pid)
        finally:
            process.terminate()


async def serve_node(worker_port: int) -> None:
    """A DB node over one worker, without SQL and without PostgreSQL, until it is told to end."""
    workers = (WorkerAddress(f"http://127.0.0.1:{worker_port}"),)
    settings = replace(
        Settings(),
        rest=replace(RestSettings(), port=0),
        router=replace(RouterSettings(), workers=workers),
    )
    node = Node(settings, None)
    await node.tenants.load()
    server = HttpServer("127.0.0.1", 0, "rest")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(node.run())
        tasks.create_task(server.run(node.rest_app()))
        async with asyncio.timeout(START_TIMEOUT_S):
            while node.not_ready():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        started()
        print(server.port, flush=True)


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, help="numbers of streams at once")
    parser.add_argument("--runs", type=int, help="of which the median is taken")
    parser.add_argument("--serve-node", type=int, metavar="PORT", help=argparse.SUPPRESS)


def main() -> int:
    options = parse_options(__doc__, options_of)
    if options.serve_node:
        uvloop.run(serve_node(options.serve_node))
        return 0
    with running() as (token_ids, worker, node):
        found = uvloop.run(measured(options, token_ids, worker, node))
    ours = {streams: _added(found["ours"][streams], found["alone"][streams]) for streams in found["ours"]}
    alone = {streams: _medians(cells) for streams, cells in found["alone"].items()}
    headline = ours.get(HEADLINE_STREAMS) or next(iter(ours.values()))
    report(
        "rest",
        {
            "streams": list(options.streams),
            "headline_streams": HEADLINE_STREAMS,
            "tokens": TOKENS,
            "tokens_unpaced": TOKENS_UNPACED,
            "step_ms": STEP_S * 1e3,
            "quick": options.quick,
        },
        {name: headline[name] for name in ("added_ttft_ms_p50", "added_per_token_ms_p99", "requests_per_s")}
        | {"by_streams": ours},
        {"by_streams": alone},
        {
            "requests_per_s": {
                streams: round(ours[streams]["requests_per_s"] / alone[streams]["requests_per_s"], 3)
                for streams in ours
            }
        },
    )
    return 0


def _added(ours: list[Cell], alone: list[Cell]) -> dict[str, Any]:
    """Medians of what the DB node adds in each run."""
    added = {
        f"added_{what}_ms_{rank}": [
            getattr(a, f"{name}_{rank}") - getattr(b, f"{name}_{rank}") for a, b in zip(ours, alone, strict=True)
        ]
        for what, name in (("ttft", "ttft"), ("per_token", "token"))
        for rank in ("p50", "p99")
    }
    rates = Spread.of([cell.requests_per_s for cell in ours])
    return {name: round(statistics.median(values), 3) for name, values in added.items()} | {
        "requests_per_s": round(rates.median, 1),
        "requests_per_s_spread": rates.as_json(1),
        "cpu_us_per_request": round(statistics.median(cell.cpu_us_per_request for cell in ours), 1),
        "cpu_us_per_token": round(statistics.median(cell.cpu_us_per_token for cell in ours), 1),
    }


def _medians(cells: list[Cell]) -> dict[str, Any]:
    names = [column.name for column in fields(Cell)]
    return {name: round(statistics.median(getattr(cell, name) for cell in cells), 3) for name in names}


if __name__ == "__main__":
    raise SystemExit(main())
