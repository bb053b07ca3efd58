"""What a vLLM with the connector must be: the same answers, whatever happens to the pool, and nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.vllm_process import VllmProcess, connector_config, vllm_engine
from tests.support import eventually
from tests.vllm.conftest import BLOCK, ENGINE, MAX_TOKENS, Pool, Questions

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def engine(pool: Pool, directory: Path, model: Path) -> Iterator[VllmProcess]:
    eventually(pool.are_daemons_listed, timeout_s=30, what="daemons to register")
    config = connector_config(pool.port)
    with vllm_engine(directory, "first", model=str(model), kv_transfer_config=config, **ENGINE) as engine:
        yield engine


def forget(engine: VllmProcess) -> None:
    """Empty vLLM's own prefix cache; it refuses while any block is held, also by the connector."""
    eventually(engine.reset, timeout_s=30, what="vLLM to have all its blocks back")


def assert_answers(engine: VllmProcess, questions: Questions) -> int:
    """Everything is asked at once; how many prompt tokens were cached."""
    completions = engine.generate(questions.prompts, MAX_TOKENS)
    assert [completion.outcome for completion in completions] == ["whole"] * len(completions)
    assert [completion.token_ids for completion in completions] == list(questions.answers)
    return sum(completion.cached_tokens for completion in completions)


def assert_nothing_is_held(pool: Pool) -> None:
    """No lease, no unfinished put, and no byte of a daemon that no page accounts for."""

    def is_at_rest() -> bool:
        stats = pool.stats()
        used = sum(node.used_bytes for node in pool.nodes())
        return stats.leases == 0 and stats.puts_pending == 0 and used == stats.bytes_committed

    eventually(is_at_rest, timeout_s=90, what="leases, puts and bytes to be given back")


def test_answers_are_the_same_while_blocks_are_evicted_and_requests_preempted(
    engine: VllmProcess, pool: Pool, questions: Questions
) -> None:
    assert_answers(engine, questions)
    forget(engine)
    assert pool.stats().blocks > 0
    cached = assert_answers(engine, questions)
    assert cached >= 2 * BLOCK * len(questions.prompts)
    forget(engine)
    assert_nothing_is_held(pool)


def test_another_process_finds_what_the_first_has_written(
    engine: VllmProcess, pool: Pool, questions: Questions, directory: Path, model: Path
) -> None:
    """Also with vLLM's default hashes and a seed of its own, and when blocks are loaded between steps."""
    config = connector_config(pool.port, load="between_steps")
    with vllm_engine(
        directory,
        "second",
        model=str(model),
        kv_transfer_config=config,
        prefix_caching_hash_algo="sha256",
        env={"PYTHONHASHSEED": "7"},
        **ENGINE,
    ) as second:
        first = second.generate(questions.prompts[:1], MAX_TOKENS)[0]
        assert first.cached_tokens >= 2 * BLOCK
        assert_answers(second, questions.some())
        forget(second)
        salted = second.generate(questions.prompts[:1], MAX_TOKENS, salt="other")[0]
        assert salted.cached_tokens == 0
        assert salted.token_ids == questions.answers[0]
        abort_some(second, questions, seed=2)
    assert_nothing_is_held(pool)


def test_requests_that_are_aborted_while_they_load_and_save_leave_nothing(
    engine: VllmProcess, pool: Pool, questions: Questions
) -> None:
    abort_some(engine, questions, seed=1)
    assert_answers(engine, questions.some())
    forget(engine)
    assert_nothing_is_held(pool)


def abort_some(engine: VllmProcess, questions: Questions, seed: int) -> None:
    """Ask everything, two thirds of it with a salt (nothing is found, everything saved); abort at any time."""
    rng = random.Random(seed)
    for salt in ("", f"salt-{seed}"):
        started = [engine.start(prompt, MAX_TOKENS, salt) for prompt in questions.prompts[:20]]
        for n, (name, _) in enumerate(started):
            if n % 3:
                started[rng.randrange(n)][1].wait_first()
                engine.abort(name)
        for n, (_, completion) in enumerate(started):
            completion.wait()
            if completion.outcome == "whole":
                assert completion.token_ids == questions.answers[n]
        forget(engine)


def test_a_daemon_that_dies_in_the_middle_costs_cache_only(
    engine: VllmProcess, pool: Pool, questions: Questions
) -> None:
    some = questions.some()
    started = [engine.start(prompt, MAX_TOKENS)[1] for prompt in some.prompts]
    started[5].wait_first()
    for node in ("dmp-0", "dmp-1"):
        pool.daemons[node].kill()
    completions = [completion.wait() for completion in started]
    assert [completion.token_ids for completion in completions] == list(some.answers)
    for node in ("dmp-0", "dmp-1"):
        pool.daemons[node] = pool.fleet.daemon(node)
    eventually(pool.are_daemons_listed, timeout_s=30, what="daemons to register")
    assert_answers(engine, some)
    forget(engine)
    assert assert_answers(engine, some) >= 2 * BLOCK * len(some.prompts)
    forget(engine)
    assert_nothing_is_held(pool)


def test_a_meta_server_that_is_started_anew_costs_cache_only(
    engine: VllmProcess, pool: Pool, questions: Questions
) -> None:
    some = questions.some()
    started = [engine.start(prompt, MAX_TOKENS)[1] for prompt in some.prompts]
    started[5].wait_first()
    pool.meta.kill()
    completions = [completion.wait() for completion in started]
    assert [completion.token_ids for completion in completions] == list(some.answers)
    pool.meta = pool.fleet.meta()
    eventually(pool.are_daemons_listed, timeout_s=30, what="daemons to register again")
    forget(engine)
    assert assert_answers(engine, some) >= 2 * BLOCK * len(some.prompts)
    forget(engine)
    assert_nothing_is_held(pool)


def test_a_vllm_that_is_killed_while_it_loads_and_saves_leaves_nothing(
    engine: VllmProcess, pool: Pool, questions: Questions
) -> None:
    """The last test of this engine. Its leases and puts end by themselves."""
    started = [engine.start(prompt, MAX_TOKENS, salt)[1] for prompt in questions.prompts[:8] for salt in ("", "killed")]
    started[0].wait_first()
    engine.kill()
    assert_nothing_is_held(pool)
    assert pool.stats().blocks > 0
