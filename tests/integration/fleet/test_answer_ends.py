"""When an answer ends, by a real worker behind a DB node: stop tokens and strings, a least length, forms."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from stratakv.text import decode, encode
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.integration.fleet.conftest import Pool

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The capital of France is"
NUM_TOKENS = 12


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(pool: Pool) -> AsyncIterator[RunningNode]:
    async with running_node(also=(pool.alone.url,)) as running:
        yield running


async def ask(node: RunningNode, **fields: Any) -> tuple[str, str, int]:
    """Greedy: text, why it ended, tokens generated."""
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True} | fields
    async with node.http.post("/v1/completions", json=body) as response:
        answer = await response.json()
    assert response.status == 200, answer
    [choice] = answer["choices"]
    return choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]


async def test_stop_tokens_and_strings_end_an_answer_unless_it_is_too_short(node: RunningNode) -> None:
    tokenizer = node.node.inference.tokens.tokenizer
    whole, reason, _ = await ask(node)
    assert reason == "length"
    tokens = encode(tokenizer, whole, special=False)
    stop = next(token for token in tokens[2:] if tokens.count(token) == 1)
    before = decode(tokenizer, tokens[: tokens.index(stop)])
    shown = decode(tokenizer, tokens[: tokens.index(stop) + 1])
    told: dict[str, Any] = {"include_stop_str_in_output": True}
    assert (await ask(node, stop_token_ids=[stop]))[:2] == (before, "stop")
    assert (await ask(node, stop_token_ids=[stop], **told))[:2] == (shown, "stop")
    word = decode(tokenizer, [stop])
    assert (await ask(node, stop=[word]))[:2] == (whole[: whole.index(word)], "stop")
    assert (await ask(node, stop=[word], **told))[:2] == (whole[: whole.index(word) + len(word)], "stop")
    text, reason, num_tokens = await ask(node, stop_token_ids=[stop], min_tokens=NUM_TOKENS)
    assert (reason, num_tokens) == ("length", NUM_TOKENS)
    assert text.startswith(before)
    assert text != whole


async def test_an_answer_is_held_to_a_form_in_vllms_words(node: RunningNode) -> None:
    text, reason, _ = await ask(node, structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"})
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", text)
    assert reason == "stop"
    assert (await ask(node, structured_outputs={"choice": ["Paris", "Oslo"]}))[0] in ("Paris", "Oslo")


async def test_an_answer_goes_on_with_the_last_message(node: RunningNode) -> None:
    talk = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of"},
    ]
    body: dict[str, Any] = {"messages": talk, "continue_final_message": True}
    async with node.http.post("/tokenize", json=body) as response:
        tokens = (await response.json())["tokens"]
    assert decode(node.node.inference.tokens.tokenizer, tokens).endswith("assistant\nThe capital of")
    how: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    async with node.http.post("/v1/chat/completions", json=body | how) as response:
        answer = await response.json()
    text = answer["choices"][0]["message"]["content"]
    assert text == (await ask(node, prompt=tokens))[0]
    assert not text.startswith("The capital")
