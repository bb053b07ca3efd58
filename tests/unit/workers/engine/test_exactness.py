"""Greedy fp32 tokens equal those of transformers, however the work is cut, cached, batched or interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.workers.engine.harness import Oracle, fp32, generate, prompt, request, running, submit
from workers.engine import FinishReason
from workers.engine.connector import Tier

PROMPTS = [prompt(1, 5), prompt(2, 48), prompt(3, 90), prompt(2, 48)[:40] + prompt(4, 30)]
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def expected(oracle: Oracle) -> list[list[int]]:
    return [oracle.greedy(token_ids, NUM_TOKENS) for token_ids in PROMPTS]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="default"),
        pytest.param({"block_size": 32}, id="blocks of 32"),
        pytest.param({"block_size": 1, "num_blocks": 600}, id="blocks of 1"),
        pytest.param({"prefix_caching": False}, id="cache off"),
        pytest.param({"max_batched_tokens": 21}, id="chunked prefill"),
        pytest.param({"max_prefill_tokens_beside_decode": 7}, id="small chunks beside decode"),
        pytest.param({"num_blocks": 9}, id="preemption"),
        pytest.param({"max_running": 1}, id="one at a time"),
    ],
)
def test_greedy_tokens_equal_the_oracles(tiny: Path, expected: list[list[int]], settings: dict[str, Any]) -> None:
    with running(fp32(tiny, **settings)) as engine:
        size = engine.config.block_size
        alone = [generate(engine, token_ids, NUM_TOKENS)[0] for token_ids in PROMPTS]
        assert alone == expected
        together = [
            submit(engine, request(token_ids, NUM_TOKENS, request_id=str(i), block_size=size))
            for i, token_ids in enumerate(PROMPTS * 3)
        ]
        assert [listener.result()[0] for listener in together] == expected * 3


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_requests_end_like_others(tiny: Path, expected: list[list[int]], prefix_caching: bool) -> None:
    with running(fp32(tiny, num_blocks=5, prefix_caching=prefix_caching)) as engine:
        listeners = [submit(engine, request(PROMPTS[0], NUM_TOKENS, request_id=str(i))) for i in range(3)]
        results = [listener.result() for listener in listeners]
    assert [tokens for tokens, _ in results] == [expected[0]] * 3
    assert sum(event.usage.preemptions for _, event in results) > 0
    assert all(sum(event.usage.tokens_by_tier.values()) == len(PROMPTS[0]) for _, event in results)


def test_the_oracle_tells_tokens_apart(expected: list[list[int]]) -> None:
    assert all(len(set(tokens)) > NUM_TOKENS / 3 for tokens in expected)


def test_a_repeated_prompt_is_taken_from_l1_up_to_its_last_token(tiny: Path, expected: list[list[int]]) -> None:
    with running(fp32(tiny)) as engine:
        _, first = generate(engine, PROMPTS[1], NUM_TOKENS)
        tokens, second = generate(engine, PROMPTS[1], NUM_TOKENS)
        assert engine.num_cached_blocks(request(PROMPTS[1], 1).keys) == 3
    assert tokens == expected[1]
    assert first.usage.tokens_by_tier[Tier.COMPUTED] == 48
    # 48 tokens are 3 blocks; the last one is computed again, because its last token's logits are needed
    assert second.usage.tokens_by_tier[Tier.L1] == 32
    assert second.usage.tokens_by_tier[Tier.COMPUTED] == 16


def test_generated_blocks_serve_the_next_turn(tiny: Path, expected: list[list[int]]) -> None:
    with running(fp32(tiny)) as engine:
        generate(engine, PROMPTS[1], NUM_TOKENS)
        next_turn = [*PROMPTS[1], *expected[1], *prompt(9, 5)]
        _, finished = generate(engine, next_turn, 1)
    assert finished.usage.tokens_by_tier[Tier.L1] == 80


def test_dropping_l1_costs_time_only(tiny: Path, expected: list[list[int]]) -> None:
    with running(fp32(tiny)) as engine:
        generate(engine, PROMPTS[2], NUM_TOKENS)
        assert engine.drop_l1() > 0
        assert engine.num_cached_blocks(request(PROMPTS[2], 1).keys) == 0
        tokens, finished = generate(engine, PROMPTS[2], NUM_TOKENS)
    assert tokens == expected[2]
    assert finished.usage.tokens_by_tier[Tier.COMPUTED] == len(PROMPTS[2])


def test_a_prefix_arriving_twice_at_once_is_computed_once(tiny: Path) -> None:
    prefix = prompt(20, 64)
    with running(fp32(tiny, num_blocks=128, max_batched_tokens=30)) as engine:
        both = [submit(engine, request(prefix + prompt(i, 9), 4, request_id=str(i))) for i in (21, 22)]
        usages = [listener.result()[1].usage for listener in both]
    assert sorted(usage.tokens_by_tier[Tier.L1] for usage in usages) == [0, 64]


def test_a_request_is_continued_where_another_engine_left_it(tiny: Path, expected: list[list[int]]) -> None:
    with running(fp32(tiny)) as engine:
        tokens, finished = generate(engine, PROMPTS[2], NUM_TOKENS, resume=expected[2][:13])
    assert tokens == expected[2][13:]
    assert finished.usage.generated_tokens == NUM_TOKENS - 13


def test_sampling_with_a_seed_continues_elsewhere_as_if_never_interrupted(tiny: Path) -> None:
    how = {"temperature": 1.3, "top_p": 0.95, "seed": 7}
    with running(fp32(tiny)) as engine:
        whole, _ = generate(engine, PROMPTS[0], NUM_TOKENS, **how)
        other_seed, _ = generate(engine, PROMPTS[0], NUM_TOKENS, **{**how, "seed": 8})
    with running(fp32(tiny, block_size=32)) as engine:
        rest, _ = generate(engine, PROMPTS[0], NUM_TOKENS, resume=whole[:9], **how)
    assert rest == whole[9:]
    assert other_seed != whole


def test_the_default_model_answers_as_in_transformers(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, oracle = AutoTokenizer.from_pretrained(smollm2), Oracle(smollm2)
    questions = ["What is the capital of France?", "Write a haiku about databases.", "List three prime numbers."]
    with running(fp32(smollm2)) as engine:
        for question in questions:
            chat = [{"role": "user", "content": question}]
            token_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            tokens, _ = generate(engine, token_ids, 16)
            assert tokens == oracle.greedy(token_ids, 16)


def test_bf16_keeps_the_answer(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    from workers.engine import EngineConfig

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    token_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    with running(EngineConfig(smollm2, device="cpu", num_blocks=64)) as engine:
        tokens, finished = generate(engine, token_ids, 30, ignore_eos=False)
        again, cached = generate(engine, token_ids, 30, ignore_eos=False)
    assert tokenizer.decode(tokens) == "The capital of France is Paris."
    assert again == tokens
    assert cached.usage.tokens_by_tier[Tier.L1] == 32
    assert finished.reason is FinishReason.STOP
    assert finished.stop_token_id == tokenizer.eos_token_id
