"""A prompt that is handed over while it is computed: the same tokens as from one worker, whatever goes wrong on the way."""

from __future__ import annotations

import itertools
import json
import os
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.integration.fleet.conftest import Pool
from tests.integration.fleet.processes import Worker
from tests.integration.fleet.test_reuse import prompt_of, published
from tests.support import eventually

OUTPUT_TOKENS = 12
_ids = itertools.count()


@dataclass
class Streamed:
    """One streamed answer."""

    token_ids: list[int] = field(default_factory=list)
    tiers: dict[str, int] = field(default_factory=dict)
    finish_reason: str | None = None
    error: str | None = None


def events(worker: Worker, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    request = urllib.request.Request(
        worker.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def stream(worker: Worker, prompt: list[int], request_id: str, max_tokens: int, transfer: dict[str, Any]) -> Streamed:
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "request_id": request_id,
        "timeout_s": 50,
        "kv_transfer_params": transfer,
    }
    answer = Streamed()
    for event in events(worker, body):
        if "error" in event:
            answer.error = event["error"]["code"]
        for choice in event.get("choices", ()):
            answer.token_ids += choice["token_ids"]
            answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        if "usage" in event:
            names = ("computed", "l1", "l2", "pool", "disk")
            answer.tiers = {name: event["usage"]["stratakv"][name] for name in names}
    return answer


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@dataclass
class Pair:
    """A prefill and a decode worker that work on the same requests."""

    prefill: Worker
    decode: Worker
    threads: ThreadPoolExecutor

    def start(self, prompt: list[int], max_tokens: int = OUTPUT_TOKENS) -> tuple[Future[Streamed], Future[Streamed]]:
        request_id = f"handed-{os.getpid()}-{next(_ids)}"
        following = {"do_remote_prefill": True, "remote_url": self.prefill.url, "remote_request_id": request_id}
        asked = {"do_remote_decode": True, "is_followed": True}
        decode = self.threads.submit(stream, self.decode, prompt, f"{request_id}-d", max_tokens, following)
        prefill = self.threads.submit(stream, self.prefill, prompt, request_id, 1, asked)
        return prefill, decode

    def run(self, prompt: list[int]) -> tuple[Streamed, Streamed]:
        prefill, decode = self.start(prompt)
        return prefill.result(60), decode.result(60)


@pytest.fixture
def pair(pool: Pool, threads: ThreadPoolExecutor) -> Pair:
    return Pair(pool.prefill, pool.decode, threads)


@pytest.mark.parametrize("num_tokens", [5, 16, 333, 640])
def test_a_prompt_handed_over_while_it_is_computed_is_answered_like_by_one_worker(
    pool: Pool, pair: Pair, tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> None:
    prompt = prompt_of(tokenizer, num_tokens, seed=1000 + num_tokens)
    first, rest = pair.run(prompt)
    assert (first.error, rest.error) == (None, None)
    assert first.token_ids + rest.token_ids == pool.alone.complete(prompt, OUTPUT_TOKENS).token_ids
    assert (first.finish_reason, rest.finish_reason) == ("length", "length")
    assert rest.tiers["pool"] == num_tokens // 16 * 16


def test_a_prefix_that_is_in_the_pool_is_loaded_and_the_rest_handed_over(
    pool: Pool, pair: Pair, tokenizer: PreTrainedTokenizerBase
) -> None:
    prefix = prompt_of(tokenizer, 320, seed=2000)
    published(pool.prefill, prefix)
    prompt = prefix + prompt_of(tokenizer, 200, seed=2001)
    first, rest = pair.run(prompt)
    assert first.token_ids + rest.token_ids == pool.alone.complete(prompt, OUTPUT_TOKENS).token_ids
    assert (rest.tiers["pool"], rest.tiers["computed"]) == (512, 9)


def test_a_prefill_in_chunks_is_handed_over_and_its_death_is_told(
    pool: Pool, threads: ThreadPoolExecutor, tokenizer: PreTrainedTokenizerBase
) -> None:
    victim = pool.fleet.worker(
        "victim", "--role", "prefill", "--node", "dmp-0", "--l1-tokens", "4096", "--max-batched-tokens", "128"
    )
    eventually(victim.is_ready, timeout_s=90, what="the worker that is to die is ready")
    pair = Pair(victim, pool.decode, threads)

    prompt = prompt_of(tokenizer, 500, seed=2002)
    first, rest = pair.run(prompt)
    expected = pool.alone.complete(prompt, OUTPUT_TOKENS).token_ids
    assert first.token_ids + rest.token_ids == expected
    assert rest.tiers["pool"] == 496

    pool.decode.drop("l1", "l2")
    total = pool.decode.get("/load")["l1_blocks_total"]
    another = prompt_of(tokenizer, 1500, seed=2003)
    prefill, decode = pair.start(another)
    eventually(lambda: pool.decode.get("/load")["l1_blocks_free"] < total, what="blocks reserved")
    victim.process.kill()
    assert prefill.exception(60) is not None or prefill.result().finish_reason is None
    assert decode.result(60).error == "handover_failed"
    eventually(lambda: pool.decode.get("/load")["l1_blocks_free"] == total, what="nothing is reserved")
    assert pool.decode.complete(prompt, OUTPUT_TOKENS).token_ids == expected


def test_what_nobody_hands_over_fails_at_once(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = prompt_of(tokenizer, 100, seed=2004)
    following = {"do_remote_prefill": True, "remote_url": pool.prefill.url, "remote_request_id": "nobody's"}
    assert stream(pool.decode, prompt, "d", 4, following).error == "handover_failed"
