"""Promise P1 as a property: the tokens of transformers, for every architecture, however requests meet in one engine.

Each example draws limits (chunks, batch, blocks so few that requests are preempted), prompts that share prefixes, what lies below
L1 and what fails on the way, and where a request was interrupted and is continued, as after a worker's death.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.unit.workers.engine.harness import (
    TINY,
    MemoryTier,
    Oracle,
    fp32,
    generate,
    prompt,
    request,
    running,
    save_tiny,
    submit,
)
from workers.engine import FinishReason
from workers.engine.kv_cache import KVCache

CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "mistral": MistralConfig(**TINY, sliding_window=256),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=32),
}
BLOCK = 8
OUTPUT_MAX = 24
PROMPTS = [
    prompt(300, 40)[:shared] + prompt(301 + i, own)
    for i, (shared, own) in enumerate([(0, 5), (16, 9), (24, 1), (40, 3), (40, 17), (32, 30)])
]
FAILED_LAYERS = st.sampled_from([-1, -1, 0, 2])
"""-1: none."""


@dataclass(frozen=True)
class Job:
    """One request of a mix."""

    prompt: int
    num_tokens: int
    num_resumed: int
    """Generated already, by a worker that died."""
    is_below: bool
    """Its prefix is asked for below L1."""
    fail_layer: int
    num_good_blocks: int
    is_cancelled: bool


JOBS = st.builds(
    Job,
    prompt=st.integers(0, len(PROMPTS) - 1),
    num_tokens=st.integers(1, OUTPUT_MAX),
    num_resumed=st.integers(0, OUTPUT_MAX - 1),
    is_below=st.booleans(),
    fail_layer=FAILED_LAYERS,
    num_good_blocks=st.integers(0, 2),
    is_cancelled=st.sampled_from([False, False, False, True]),
)
LIMITS = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(-(-(70 + OUTPUT_MAX) // BLOCK), 30),
        "max_running": st.integers(1, 6),
        "max_batched_tokens": st.sampled_from([7, 19, 64, 4096]),
        "max_prefill_tokens_beside_decode": st.sampled_from([3, 16, 1024]),
        "prefix_caching": st.booleans(),
        "load_ahead_requests": st.sampled_from([0, 4]),
    }
)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


@cache
def answers(directory: Path) -> list[list[int]]:
    """By transformers, of every prompt."""
    oracle = Oracle(directory)
    return [oracle.greedy(token_ids, OUTPUT_MAX) for token_ids in PROMPTS]


@settings(max_examples=10)
@given(limits=LIMITS, jobs=st.lists(JOBS, min_size=1, max_size=8), below_fails=FAILED_LAYERS, fills=st.booleans())
def test_any_mix_of_requests_gives_the_oracles_tokens(
    model: Path, limits: dict[str, Any], jobs: list[Job], below_fails: int, fills: bool
) -> None:
    expected = answers(model)
    tiers: list[MemoryTier] = []

    def below(cache: KVCache) -> MemoryTier:
        pages = tiers[0].pages if tiers else {}
        tiers.append(MemoryTier(cache, pages, fault={"fail_layer": below_fails, "num_good_blocks": 1}))
        return tiers[-1]

    if fills:  # an engine that died since has written all prompts down
        with running(fp32(model, block_size=BLOCK), below) as engine:
            for token_ids in PROMPTS:
                generate(engine, token_ids, 1)
    with running(fp32(model, block_size=BLOCK, **limits), below) as engine:
        listeners = []
        for number, job in enumerate(jobs):
            resumed = expected[job.prompt][: min(job.num_resumed, job.num_tokens - 1)]
            what = request(
                PROMPTS[job.prompt], job.num_tokens, request_id=str(number), block_size=BLOCK, resume=resumed
            )
            if job.is_below:
                fault = {"fail_layer": job.fail_layer, "num_good_blocks": job.num_good_blocks}
                what.external = tiers[-1].hit(what.keys, engine.num_cached_blocks(what.keys), **fault)
            listeners.append((submit(engine, what), resumed))
            if job.is_cancelled:
                engine.cancel(str(number))
        for job, (listener, resumed) in zip(jobs, listeners, strict=True):
            got, finished = listener.result()
            wanted = expected[job.prompt][len(resumed) : job.num_tokens]
            assert got == wanted[: len(got)]
            assert finished.reason in (FinishReason.LENGTH, FinishReason.CANCELLED)
            assert job.is_cancelled or got == wanted
    assert engine.failure is None
