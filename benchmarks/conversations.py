"""Conversations that go on turn by turn on several servers, for `chat` and `coder`.

A turn sends the whole history and a new message. vLLM gets token ids, without a server in between; StrataKV gets text over its
REST API, so that its figures hold the DB node, tokenising and routing as well.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchmarks.harness import Spread, words
from benchmarks.vllm_process import BLOCK_SIZE, VllmProcess, vllm_engine
from stratakv.rest_client import RestClient
from stratakv.text import decode, encode, load_tokenizer
from stratakv.up.instance import scratch_instance

SETTLE_S = 0.2
"""Between requests of two arms: what one still does must not slow the other."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths in tokens; `l1_tokens` is what the engine's own cache holds on every side."""

    conversations: int
    history: int
    new: int
    output: int
    l1_tokens: int
    max_model_len: int


class Arm(Protocol):
    """One server and its copy of the conversations."""

    def turn(self, number: int, message: str, asked_at: float) -> float:
        """Ask, wait for the whole answer and keep it; seconds from `asked_at` (monotonic) to the first token."""


class Texts:
    """Random words of a wanted number of tokens."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._tokenizer = load_tokenizer(directory)
        self._rng = random.Random(seed)

    def text(self, num_tokens: int) -> str:
        return decode(self._tokenizer, self.token_ids(words(2 * num_tokens, self._rng))[:num_tokens])

    def token_ids(self, text: str) -> list[int]:
        return encode(self._tokenizer, text, special=False)


class VllmArm:
    """vLLM by itself."""

    def __init__(self, engine: VllmProcess, texts: Texts, histories: Sequence[str], output: int) -> None:
        self._engine = engine
        self._texts = texts
        self._output = output
        self._token_ids = [texts.token_ids(history) for history in histories]

    def turn(self, number: int, message: str, asked_at: float) -> float:
        history = self._token_ids[number]
        history += self._texts.token_ids(message)
        _, answer = self._engine.start(history, self._output, at=asked_at)
        if answer.wait().outcome != "whole":
            raise SystemExit(f"vLLM failed: {answer.outcome}")
        history += answer.token_ids
        return answer.ttft_s


class StrataArm:
    """An instance of StrataKV, by its REST API."""

    def __init__(self, url: str, model: str, histories: Sequence[str], output: int) -> None:
        self._clients = [RestClient(url) for _ in histories]
        self._model = model
        self._output = output
        self._histories = list(histories)
        self.tokens_by_tier: dict[str, int] = {}
        self._lock = threading.Lock()

    def turn(self, number: int, message: str, asked_at: float) -> float:
        waited_s = time.monotonic() - asked_at
        prompt = self._histories[number] + message
        answer = self._clients[number].complete(
            prompt, model=self._model, max_tokens=self._output, temperature=0.0, ignore_eos=True
        )
        self._histories[number] = prompt + answer.text
        with self._lock:
            for tier, count in answer.tokens_by_tier().items():
                self.tokens_by_tier[tier] = self.tokens_by_tier.get(tier, 0) + count
        return waited_s + answer.ttft_s


@dataclass(slots=True)
class Figures:
    """What one arm measured."""

    unloaded_ms: list[float] = field(default_factory=list)
    loaded_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"ttft_unloaded_ms": Spread.of(self.unloaded_ms).as_json(1)}
        if self.tokens_per_s:
            told["output_tokens_per_s"] = Spread.of(self.tokens_per_s).as_json(1)
        if self.loaded_ms:
            ordered = sorted(self.loaded_ms)
            told["ttft_loaded_ms"] = Spread.of(ordered).as_json(1)
            told["ttft_loaded_ms_p99"] = round(p99(ordered), 1)
        return told


def p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def one_by_one(arms: Sequence[tuple[Arm, Figures]], texts: Texts, workload: Workload, *, keep: bool = True) -> None:
    """A turn of each conversation on each arm, nothing else running."""
    in_turns = list(arms)
    for number in range(workload.conversations):
        message = texts.text(workload.new)
        for arm, figures in in_turns:
            ttft_s = arm.turn(number, message, time.monotonic())
            if keep:
                figures.unloaded_ms.append(ttft_s * 1e3)
            time.sleep(SETTLE_S)
        in_turns.reverse()


def all_at_once(arm: Arm, figures: Figures, texts: Texts, workload: Workload) -> float:
    """A turn of every conversation, all sent at the same moment; turns per second."""
    messages = [texts.text(workload.new) for _ in range(workload.conversations)]
    began = time.monotonic()
    run_in_threads([partial(arm.turn, number, message, began) for number, message in enumerate(messages)])
    turns_per_s = workload.conversations / (time.monotonic() - began)
    figures.tokens_per_s.append(turns_per_s * workload.output)
    return turns_per_s


def by_poisson(arm: Arm, figures: Figures, texts: Texts, workload: Workload, gaps_s: Sequence[float]) -> None:
    """Turns that arrive after these gaps, one conversation after the other; one that is busy takes its next turn late."""
    arrivals: list[queue.Queue[tuple[str, float] | None]] = [queue.Queue() for _ in range(workload.conversations)]
    lock = threading.Lock()

    def converse(number: int) -> None:
        while (arrival := arrivals[number].get()) is not None:
            ttft_s = arm.turn(number, *arrival)
            with lock:
                figures.loaded_ms.append(ttft_s * 1e3)

    def arrive() -> None:
        due = time.monotonic()
        for index, gap_s in enumerate(gaps_s):
            due += gap_s
            time.sleep(max(0.0, due - time.monotonic()))
            arrivals[index % workload.conversations].put((texts.text(workload.new), due))
        for waiting in arrivals:
            waiting.put(None)

    run_in_threads([arrive, *(partial(converse, number) for number in range(workload.conversations))])


def run_in_threads(work: Sequence[Callable[[], object]]) -> None:
    """Raises what the first of them raised."""
    errors: list[BaseException] = []

    def run(each: Callable[[], object]) -> None:
        try:
            each()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,), daemon=True) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def vllm_arm(
    scratch: Path, name: str, model: Path, texts: Texts, histories: Sequence[str], workload: Workload, tokens: int
) -> Iterator[VllmArm]:
    """vLLM whose cache holds `tokens`, as it is without further arguments: compiled, chunked prefill, prefix caching."""
    with vllm_engine(
        scratch,
        name,
        kv_cache_gib=2,
        model=str(model),
        dtype="bfloat16",
        enforce_eager=False,
        max_model_len=workload.max_model_len,
        num_gpu_blocks_override=1 + tokens // BLOCK_SIZE,
    ) as engine:
        yield VllmArm(engine, texts, histories, workload.output)


@contextmanager
def strata_arm(histories: Sequence[str], workload: Workload, *settings: str) -> Iterator[StrataArm]:
    """An instance with one worker, which has both cores to itself, as vLLM has."""
    sets = [f"worker.l1_tokens={workload.l1_tokens}", "worker.dtype=bf16", *settings]
    flags = [flag for each in sets for flag in ("--set", each)]
    with scratch_instance("--prefill-workers", "0", "--decode-workers", "1", *flags, quiet=True) as instance:
        yield StrataArm(instance.rest_url, instance.state["model"], histories, workload.output)
