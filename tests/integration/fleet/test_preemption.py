"""Requests that do not fit into L1 together: each is preempted, goes on from the pool, and answers as if it had been alone."""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor

from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerBase

from tests.integration.fleet.conftest import Pool
from tests.integration.fleet.processes import Worker
from tests.integration.fleet.test_reuse import prompt_of
from tests.support import eventually

NUM_REQUESTS = 2
PROMPT_TOKENS, OUTPUT_TOKENS = 200, 56
L1_TOKENS = 432
"""Both prompts fit, and not both answers."""


def sources(worker: Worker) -> dict[str, float]:
    """Tokens that preempted requests had computed, by where their KV came from again."""
    with urllib.request.urlopen(worker.url + "/metrics", timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {s.labels["source"]: s.value for s in samples if s.name == "stratakv_preempted_tokens_total"}


def test_what_a_preempted_request_lost_comes_back_from_the_pool(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [prompt_of(tokenizer, PROMPT_TOKENS + number, seed=5000 + number) for number in range(NUM_REQUESTS)]
    small = pool.fleet.worker("small", "--node", "dmp-0", "--l1-tokens", str(L1_TOKENS))
    expected = [pool.alone.complete(prompt, OUTPUT_TOKENS).token_ids for prompt in prompts]
    eventually(small.is_ready, timeout_s=90, what="the small worker is ready")
    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        answers = list(threads.map(lambda prompt: small.complete(prompt, OUTPUT_TOKENS), prompts))
    assert [answer.token_ids for answer in answers] == expected
    came_from = sources(small)
    assert came_from["l2"] + came_from["pool"] > 0
    small.process.stop()
