"""Promise P1 on real processes, in fp32: the same greedy tokens wherever the prefix's KV comes from."""

from __future__ import annotations

import random

import psycopg
from transformers import PreTrainedTokenizerBase

from tests.integration.fleet.conftest import Pool
from tests.integration.fleet.processes import Worker
from tests.support import eventually

BLOCK = 16
OUTPUT_TOKENS = 24


def prompt_of(tokenizer: PreTrainedTokenizerBase, num_tokens: int, seed: int) -> list[int]:
    """A prompt of exactly so many tokens that nobody else uses."""
    rng = random.Random(seed)
    nouns = [
        "router",
        "cable",
        "camera",
        "thermostat",
        "speaker",
        "garden",
        "kitchen",
        "customer",
        "update",
        "night",
        "morning",
        "battery",
        "light",
        "door",
    ]
    text = " ".join(
        f"Entry {number}: the {rng.choice(nouns)} and the {rng.choice(nouns)}." for number in range(num_tokens)
    )
    return list(tokenizer.encode(text))[:num_tokens]


def published(worker: Worker, prompt: list[int], owner: int = 0) -> None:
    """The worker answers a prefill for another worker only when the prompt's blocks can be found."""
    handover = worker.complete(prompt, 1, owner=owner, kv_transfer_params={"do_remote_decode": True}).handover
    assert handover is not None
    assert handover["do_remote_prefill"] is True


def test_blocks_are_put_into_the_pool_for_the_tenant_that_had_them_computed(
    pool: Pool, tokenizer: PreTrainedTokenizerBase
) -> None:
    published(pool.prefill, prompt_of(tokenizer, 5 * BLOCK, seed=7001), owner=7)
    published(pool.prefill, prompt_of(tokenizer, 3 * BLOCK, seed=8001), owner=8)
    with psycopg.connect(pool.fleet.database_url) as connection:
        put = "SELECT owner, sum(greatest(length(keys) / 32, (SELECT count(*) FROM stratakv.replicas WHERE put_seq = seq)))"
        rows = connection.execute(
            f"{put} FROM stratakv.put_sessions WHERE owner IN (7, 8) AND state = 'committed' GROUP BY 1 ORDER BY 1".encode()
        )
        assert rows.fetchall() == [(7, 5), (8, 3)]


def test_cold_l1_l2_and_pool_hits_answer_alike(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = prompt_of(tokenizer, 500, seed=1)
    expected = pool.alone.complete(prompt, OUTPUT_TOKENS).token_ids

    cold = pool.prefill.complete(prompt, OUTPUT_TOKENS)
    assert cold.tiers == {"computed": 500}
    from_l1 = pool.prefill.complete(prompt, OUTPUT_TOKENS)
    assert set(from_l1.tiers) == {"computed", "l1"}
    published(pool.prefill, prompt)
    pool.prefill.drop("l1")
    from_l2 = pool.prefill.complete(prompt, OUTPUT_TOKENS)
    assert set(from_l2.tiers) == {"computed", "l2"}
    pool.prefill.drop("l1", "l2")
    from_pool = pool.prefill.complete(prompt, OUTPUT_TOKENS)
    assert set(from_pool.tiers) == {"computed", "pool"}
    from_other_host = pool.decode.complete(prompt, OUTPUT_TOKENS)
    assert set(from_other_host.tiers) == {"computed", "pool"}

    for answer in (cold, from_l1, from_l2, from_pool, from_other_host):
        assert answer.token_ids == expected
        assert sum(answer.tiers.values()) == len(prompt)
    for hit in (from_l1, from_l2, from_pool, from_other_host):
        assert 1 <= hit.tiers["computed"] <= BLOCK


def test_larger_blocks_answer_alike(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    wide = pool.fleet.worker("wide", "--node", "dmp-0", "--block-size", "32", "--l1-tokens", "2048")
    eventually(wide.is_ready, timeout_s=90, what="worker with blocks of 32 ready")
    prompt = prompt_of(tokenizer, 300, seed=11)
    expected = pool.decode.complete(prompt, OUTPUT_TOKENS).token_ids

    cold = wide.complete(prompt, OUTPUT_TOKENS)
    from_l1 = wide.complete(prompt, OUTPUT_TOKENS)
    published(wide, prompt)
    wide.drop("l1")
    from_l2 = wide.complete(prompt, OUTPUT_TOKENS)
    wide.drop("l1", "l2")
    from_pool = wide.complete(prompt, OUTPUT_TOKENS)

    assert cold.tiers == {"computed": 300}, "blocks of another size are of another namespace"
    assert [set(hit.tiers) - {"computed"} for hit in (from_l1, from_l2, from_pool)] == [{"l1"}, {"l2"}, {"pool"}]
    for answer in (cold, from_l1, from_l2, from_pool):
        assert answer.token_ids == expected


def test_split_prefill_and_decode_answer_like_one_worker(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = prompt_of(tokenizer, 333, seed=2)
    expected = pool.alone.complete(prompt, OUTPUT_TOKENS).token_ids

    first = pool.prefill.complete(prompt, 1, kv_transfer_params={"do_remote_decode": True})
    assert first.handover is not None
    assert first.handover["do_remote_prefill"] is True
    params = first.handover | {"output_token_ids": first.token_ids}
    rest = pool.decode.complete(prompt, OUTPUT_TOKENS, kv_transfer_params=params)

    assert first.token_ids + rest.token_ids == expected
    assert rest.tiers["pool"] == 333 // BLOCK * BLOCK


def test_seeded_sampling_is_the_same_split_or_joint(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = prompt_of(tokenizer, 120, seed=3)
    sampling = {"temperature": 0.8, "seed": 7}
    joint = pool.alone.complete(prompt, OUTPUT_TOKENS, **sampling).token_ids

    first = pool.prefill.complete(prompt, 1, kv_transfer_params={"do_remote_decode": True}, **sampling)
    assert first.handover is not None
    params = first.handover | {"output_token_ids": first.token_ids}
    rest = pool.decode.complete(prompt, OUTPUT_TOKENS, kv_transfer_params=params, **sampling)

    assert first.token_ids + rest.token_ids == joint


def test_a_prefix_shared_by_two_conversations_is_computed_once(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    shared = prompt_of(tokenizer, 320, seed=4)
    one, other = shared + prompt_of(tokenizer, 40, seed=5), shared + prompt_of(tokenizer, 40, seed=6)

    pool.prefill.complete(one, 4, kv_transfer_params={"do_remote_decode": True})
    elsewhere = pool.decode.complete(other, OUTPUT_TOKENS)

    assert elsewhere.tiers == {"pool": 320, "computed": 40}
    assert elsewhere.token_ids == pool.alone.complete(other, OUTPUT_TOKENS).token_ids


def test_the_next_turn_hits_what_was_generated(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = prompt_of(tokenizer, 64, seed=8)
    answer = pool.decode.complete(prompt, 40).token_ids
    next_turn = prompt + answer + prompt_of(tokenizer, 10, seed=9)

    hit = pool.decode.complete(next_turn, 4)

    assert hit.tiers["l1"] >= (64 + 40 - BLOCK) // BLOCK * BLOCK


def test_stop_strings_end_the_answer_before_them(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = prompt_of(tokenizer, 50, seed=10)
    whole = pool.alone.post(
        "/v1/completions", {"prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    )
    text = whole["choices"][0]["text"]
    stop = text[10:14]

    cut = pool.alone.post(
        "/v1/completions", {"prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stop": stop}
    )

    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"


def test_kv_is_shared_only_under_the_same_salt(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = prompt_of(tokenizer, 160, seed=12)
    plain = pool.prefill.complete(prompt, OUTPUT_TOKENS)
    salted = pool.prefill.complete(prompt, OUTPUT_TOKENS, cache_salt="a")
    again = pool.prefill.complete(prompt, OUTPUT_TOKENS, cache_salt="a")
    elsewhere = pool.decode.complete(prompt, OUTPUT_TOKENS, cache_salt="b")

    assert [answer.tiers for answer in (plain, salted, elsewhere)] == [{"computed": 160}] * 3
    assert again.tiers == {"l1": 144, "computed": 16}
    assert {tuple(answer.token_ids) for answer in (plain, salted, again, elsewhere)} == {tuple(plain.token_ids)}


def test_a_first_block_that_the_answer_fills_is_salted_too(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = prompt_of(tokenizer, 9, seed=13)
    answer = pool.prefill.complete(prompt, 30, cache_salt="a").token_ids
    next_turn = prompt + answer

    assert pool.prefill.complete(next_turn, 2).tiers == {"computed": len(next_turn)}
    assert pool.prefill.complete(next_turn, 2, cache_salt="a").tiers["l1"] >= BLOCK
