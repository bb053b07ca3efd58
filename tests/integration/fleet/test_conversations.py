"""A conversation's next turn finds the KV of the last prompt and answer, on whichever DB node it arrives."""

from __future__ import annotations

import asyncio
from typing import Any

from stratakv import migrate
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.integration.fleet.conftest import Pool

BLOCK = 16
ANSWER_TOKENS = 40


async def say(node: RunningNode, conversation: str, text: str) -> dict[str, Any]:
    """Usage of a turn whose answer is chosen at random, so that its tokens need not be those of its text."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": ANSWER_TOKENS, "seed": 5, "temperature": 1.5}
    async with node.http.post(f"/v1/conversations/{conversation}/messages", json=body) as response:
        answer: dict[str, Any] = await response.json()
    assert response.status == 200, answer
    usage: dict[str, Any] = answer["usage"]
    return usage


async def test_all_blocks_of_the_last_turn_are_cached_in_the_next(pool: Pool, postgres_url: str) -> None:
    await asyncio.to_thread(migrate.upgrade, postgres_url)
    async with (
        running_node(also=(pool.decode.url,), database_url=postgres_url) as one,
        running_node(also=(pool.decode.url,), database_url=postgres_url) as other,
    ):
        async with one.http.post("/v1/conversations") as response:
            conversation = (await response.json())["id"]
        before: dict[str, Any] | None = None
        for node, text in (
            (one, "Tell me of the sea."),
            (other, "And of its fish?"),
            (one, "Which one is the largest?"),
        ):
            usage = await say(node, conversation, text)
            if before is not None:
                # The last token that was generated has no KV: nothing came after it.
                said = before["prompt_tokens"] + before["completion_tokens"] - 1
                assert usage["prompt_tokens_details"]["cached_tokens"] >= said // BLOCK * BLOCK
            before = usage
