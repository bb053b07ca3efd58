"""A model of sliding windows and full attention, with vLLM's hybrid cache manager: the same answers, and nothing left behind."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.vllm_process import VllmProcess, connector_config, vllm_engine
from stratakv.layout import HEADER_BYTES, HEADER_MAGIC
from stratakv.pool.dmp_client import connect
from tests.support import eventually
from tests.vllm.conftest import BLOCK, Pool, Questions
from tests.vllm.hybrid_model import VOCABULARY, WINDOW, write_hybrid_model
from tests.vllm.test_connector import abort_some, assert_answers, assert_nothing_is_held, forget

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

MAX_TOKENS = 12
BEGINNING = 4 * BLOCK
ENGINE = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_batched_tokens": 512,
    "num_gpu_blocks_override": 61,
    "max_num_seqs": 6,
    "skip_tokenizer_init": True,
}
"""Room for three prompts at once, which are computed in pieces: blocks leave the windows while others are saved."""


@pytest.fixture(scope="module")
def hybrid_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert WINDOW < BEGINNING - BLOCK
    return write_hybrid_model(tmp_path_factory.mktemp("hybrid") / "model")


@pytest.fixture(scope="module")
def hybrid_questions(hybrid_model: Path, directory: Path) -> Questions:
    """Prompts of five beginnings; answered without any connector."""
    rng = random.Random(6)
    beginnings, ends = ([_tokens(rng, n) for n in lengths] for lengths in ([BEGINNING] * 5, [90, 250, 380, 20] * 5))
    prompts = [[*beginnings[n % 5], *end] for n, end in enumerate(ends)]
    with vllm_engine(directory, "plain-hybrid", model=str(hybrid_model), **ENGINE) as engine:
        answers = [answer.token_ids for answer in engine.generate(prompts, MAX_TOKENS)]
        other = engine.generate([[*beginnings[1], *ends[0]]], MAX_TOKENS)[0].token_ids
    assert other != answers[0], "the answers do not depend on what the tests are about"
    return Questions(prompts, answers)


@pytest.fixture(scope="module")
def engine(pool: Pool, directory: Path, hybrid_model: Path, hybrid_questions: Questions) -> Iterator[VllmProcess]:
    eventually(pool.are_daemons_listed, timeout_s=30, what="daemons to register")
    config = connector_config(pool.port)
    with vllm_engine(directory, "hybrid", model=str(hybrid_model), kv_transfer_config=config, **ENGINE) as engine:
        assert engine.log_file.read_text().count("joined") == 3, "not a namespace for each of the three groups"
        yield engine


def test_each_group_gets_what_it_needs_of_a_shared_prefix(
    engine: VllmProcess, pool: Pool, hybrid_questions: Questions
) -> None:
    assert_answers(engine, hybrid_questions)
    forget(engine)
    assert_nothing_is_held(pool)
    assert assert_answers(engine, hybrid_questions) >= BEGINNING * len(hybrid_questions.prompts)
    forget(engine)
    one = engine.generate(hybrid_questions.prompts[:1], MAX_TOKENS)[0]
    assert one.cached_tokens >= BEGINNING
    assert one.token_ids == hybrid_questions.answers[0]
    forget(engine)
    assert_nothing_is_held(pool)


def test_an_abort_while_windows_are_saved_leaves_nothing(
    engine: VllmProcess, pool: Pool, hybrid_questions: Questions
) -> None:
    abort_some(engine, hybrid_questions, seed=3)
    assert_answers(engine, hybrid_questions)
    forget(engine)
    assert_nothing_is_held(pool)


def test_requests_whose_pages_are_damaged_are_computed(
    engine: VllmProcess, pool: Pool, hybrid_questions: Questions
) -> None:
    forget(engine)
    assert _damage_all(pool) > 0
    assert_answers(engine, hybrid_questions)
    assert "load_cut" in engine.log_file.read_text()
    forget(engine)
    assert_nothing_is_held(pool)


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def _damage_all(pool: Pool) -> int:
    """Change a byte of the first layer of every page; how many there were."""
    damaged = 0
    for node in pool.nodes():
        connection = connect(node.segment, deadline=time.monotonic() + 5)
        mapping = connection.transport.mapping()
        assert mapping is not None
        for offset in range(0, len(mapping) - HEADER_BYTES, HEADER_BYTES):
            if mapping[offset : offset + len(HEADER_MAGIC)] == HEADER_MAGIC:
                mapping[offset + HEADER_BYTES + 100] ^= 1
                damaged += 1
        connection.close()
    return damaged
