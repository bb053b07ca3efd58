"""Every endpoint by OpenAI's own client, sync and async, whole and streamed; and those that vLLM's clients know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from stratakv.text import encode, render_chat
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import MAX_MODEL_LEN, MODEL, StandInWorker

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest_asyncio.fixture
async def node() -> AsyncIterator[RunningNode]:
    worker = await StandInWorker("w0").start()
    async with running_node(worker) as node:
        yield node
    await worker.stop()


async def test_the_sync_client_reads_every_endpoint_as_the_async_one_does(node: RunningNode) -> None:
    def in_turn() -> list[str | None]:
        with openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            assert [model.id for model in client.models.list()] == [MODEL]
            assert client.models.retrieve(MODEL).id == MODEL
            whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5)
            events = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5, stream=True)
            chat = "".join(event.choices[0].delta.content or "" for event in events)
            text = client.completions.create(model=MODEL, prompt="x", max_tokens=5).choices[0].text
            texts = client.completions.create(model=MODEL, prompt="x", max_tokens=5, stream=True)
            streamed = "".join(event.choices[0].text for event in texts)
            return [whole.choices[0].message.content, chat, text, streamed]

    chat, chat_streamed, text, text_streamed = await asyncio.to_thread(in_turn)
    assert chat == chat_streamed
    assert text == text_streamed
    again = await node.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5)
    assert again.choices[0].message.content == chat


async def test_embeddings_are_refused_as_not_found(node: RunningNode) -> None:
    with pytest.raises(openai.NotFoundError, match="embeddings") as caught:
        await node.openai.embeddings.create(model=MODEL, input="x")
    assert caught.value.code == "not_offered"


async def post(node: RunningNode, path: str, **body: Any) -> tuple[int, Any]:
    async with node.http.post(path, json=body) as response:
        return response.status, await response.json()


async def test_texts_become_tokens_and_tokens_texts(node: RunningNode) -> None:
    tokenizer = node.node.inference.tokens.tokenizer
    token_ids = encode(tokenizer, "Once upon a time")
    status, told = await post(node, "/tokenize", model=MODEL, prompt="Once upon a time", return_token_strs=True)
    assert status == 200
    assert told == {
        "count": len(token_ids),
        "max_model_len": MAX_MODEL_LEN,
        "tokens": token_ids,
        "token_strs": [tokenizer.convert_ids_to_tokens(token) for token in token_ids],
    }
    assert await post(node, "/detokenize", tokens=token_ids) == (200, {"prompt": "Once upon a time"})
    assert await post(node, "/detokenize", tokens=[]) == (200, {"prompt": ""})


async def test_messages_become_the_tokens_of_their_request(node: RunningNode) -> None:
    tokenizer = node.node.inference.tokens.tokenizer
    _, told = await post(node, "/tokenize", messages=HELLO)
    assert told["tokens"] == render_chat(tokenizer, HELLO)
    _, shorter = await post(node, "/tokenize", messages=HELLO, add_generation_prompt=False)
    assert told["tokens"][: shorter["count"]] == shorter["tokens"]
    assert shorter["count"] < told["count"]
    long = "word " * 5000
    _, told = await post(node, "/tokenize", prompt=long)
    assert told["tokens"] == encode(tokenizer, long)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": ["x"]}, "tokens"),
    ],
)
async def test_what_cannot_be_tokens_is_refused_by_name(node: RunningNode, path: str, body: Any, param: str) -> None:
    status, told = await post(node, path, **body)
    assert status == 400
    assert told["error"]["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_tokens_of_another_model_are_not_found(node: RunningNode, path: str) -> None:
    status, told = (
        await post(node, path, model="other", prompt="x")
        if path == "/tokenize"
        else await post(node, path, model="other", tokens=[1])
    )
    assert (status, told["error"]["code"]) == (404, "model_not_found")
