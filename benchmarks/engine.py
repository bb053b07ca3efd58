"""engine: prompt tokens and output tokens per second of the engine alone, against vLLM on the same CPU and transformers.

No cache anywhere: every prompt is new, prefix caching is off on all sides. Prefill: one prompt of 512, 3,000 or 7,500 tokens, one
token out. Decode: 1, 8 or 32 requests at once, each with a prompt of 64 tokens; the time of 33 tokens less that of one.
The engines take turns in one run. `share_of_bound`: the time that reading the weights and keys once, or the operations, would
take at the rates measured of this machine's memory and matrix units, over the time that was needed.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_bounds import decode_cost, prefill_cost
from benchmarks.harness import Spread, parse_options, report
from benchmarks.vllm_process import VllmProcess, vllm_engine
from stratakv import models
from stratakv.keys import block_keys
from stratakv.models import DEFAULT_MODEL
from stratakv.settings import ModelSettings
from workers.engine import Engine, EngineConfig, EngineDtype, EngineRequest, FinishedEvent, SamplingParams, kernels
from workers.engine.model_config import read_model_config

PREFILL = (512, 3000, 7500)
DECODE = (1, 8, 32)
DECODE_PROMPT = 64
DECODE_STEPS = 32
MAX_MODEL_LEN = 8192
FIRST_TOKEN_ID, STOP_TOKEN_ID = 1000, 40000
RUNS, RUNS_QUICK = 5, 2
SETTLE_S = 0.3

Generate = Callable[[list[list[int]], int], float]
"""Prompts and the number of tokens wanted of each → seconds until all are there."""


def prompts(rng: random.Random, count: int, length: int) -> list[list[int]]:
    return [[rng.randrange(FIRST_TOKEN_ID, STOP_TOKEN_ID) for _ in range(length)] for _ in range(count)]


class Ours:
    """The engine as a worker runs it, without lower tiers."""

    def __init__(self, model: Path) -> None:
        self._engine = Engine(EngineConfig(model, dtype=EngineDtype.BF16, prefix_caching=False))
        self._engine.start()
        self._numbers = iter(range(1 << 31))

    def __call__(self, token_ids: list[list[int]], num_tokens: int) -> float:
        done = threading.Semaphore(0)
        began = time.perf_counter()
        for each in token_ids:
            request = EngineRequest(
                request_id=str(next(self._numbers)),
                token_ids=each,
                keys=block_keys(each, self._engine.config.block_size),
                sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
            )
            self._engine.submit(request, lambda event: done.release() if isinstance(event, FinishedEvent) else None)
        for _ in token_ids:
            done.acquire()
        return time.perf_counter() - began

    def close(self) -> None:
        self._engine.shutdown()


class Vllm:
    """vLLM's engine, without a server."""

    def __init__(self, engine: VllmProcess) -> None:
        self._engine = engine

    def __call__(self, token_ids: list[list[int]], num_tokens: int) -> float:
        began = time.monotonic()
        answers = self._engine.generate(token_ids, num_tokens)
        return max(answer.done_at for answer in answers) - began


class Transformers:
    """The model as transformers runs it, in bf16; a batch goes through it together."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    @torch.inference_mode()
    def __call__(self, token_ids: list[list[int]], num_tokens: int) -> float:
        began = time.perf_counter()
        given = torch.tensor(token_ids)
        self._model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - began


def measure(engines: dict[str, Generate], runs: int, rng: random.Random) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each engine, by what was measured."""
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    names = list(engines)
    for name in names:
        engines[name](prompts(rng, 1, 300), 4)
        engines[name](prompts(rng, 8, 40), 4)
    for _ in range(runs):
        for length in PREFILL:
            for name in names:
                seconds = engines[name](prompts(rng, 1, length), 1)
                rates[name].setdefault(f"prefill_{length}", []).append(length / seconds)
                time.sleep(SETTLE_S)
        for batch in DECODE:
            for name in names:
                first, whole = (engines[name](prompts(rng, batch, DECODE_PROMPT), n) for n in (1, 1 + DECODE_STEPS))
                rates[name].setdefault(f"decode_{batch}", []).append(batch * DECODE_STEPS / (whole - first))
                time.sleep(SETTLE_S)
        names.reverse()
    return rates


def share_of_bound(model: Path, tokens_per_s: dict[str, float]) -> dict[str, Any]:
    """What was measured of the machine, and how near to it each figure comes."""
    if not kernels.is_supported():
        return {}
    config, bounds = read_model_config(model), kernels.measure_bounds(torch.get_num_threads())
    num_before = DECODE_PROMPT + (1 + DECODE_STEPS) / 2
    least_s = {f"prefill_{n}": prefill_cost(config, n).seconds(bounds) / n for n in PREFILL}
    least_s |= {f"decode_{n}": decode_cost(config, n, num_before).seconds(bounds) / n for n in DECODE}
    return {
        "machine_gb_per_s": round(bounds.bytes_per_s / 1e9, 1),
        "machine_tflop_per_s": round(bounds.operations_per_s / 1e12, 2),
        "share_of_bound": {what: round(tokens_per_s[what] * seconds, 2) for what, seconds in least_s.items()},
    }


def main() -> int:
    options = parse_options(__doc__)
    model = models.pull(DEFAULT_MODEL, ModelSettings().cache_dir.expanduser())
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stratakv-bench-")))
        process = stack.enter_context(
            vllm_engine(
                scratch,
                "vllm",
                kv_cache_gib=2,
                model=str(model),
                dtype="bfloat16",
                enforce_eager=False,
                enable_prefix_caching=False,
                max_model_len=MAX_MODEL_LEN,
                max_num_batched_tokens=MAX_MODEL_LEN,
            )
        )
        ours = Ours(model)
        stack.callback(ours.close)
        engines: dict[str, Generate] = {"ours": ours, "vllm": Vllm(process), "transformers": Transformers(model)}
        rates = measure(engines, RUNS_QUICK if options.quick else RUNS, random.Random(options.seed))
    medians = {name: {what: Spread.of(v).median for what, v in each.items()} for name, each in rates.items()}
    told: dict[str, dict[str, Any]] = {
        name: {f"{what}_tokens_per_s": Spread.of(values).as_json(1) for what, values in each.items()}
        for name, each in rates.items()
    }
    ratio = {
        f"{kind}_ours_over_{name}_{number}": round(
            medians["ours"][f"{kind}_{number}"] / medians[name][f"{kind}_{number}"], 2
        )
        for name in ("vllm", "transformers")
        for kind, numbers in (("prefill", PREFILL), ("decode", DECODE))
        for number in numbers
    }
    report(
        "engine",
        {"model": DEFAULT_MODEL, "dtype": "bf16", "quick": options.quick, "seed": options.seed},
        told["ours"] | share_of_bound(model, medians["ours"]),
        {"vllm": told["vllm"], "transformers": told["transformers"]},
        ratio,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
