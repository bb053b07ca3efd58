"""Prefill and decode of one request at once: tokens in order, and whoever fails, the answer is the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from tests.integration.dbnode.running_node import PoolOfBlocks
from tests.integration.dbnode.test_faults import LONG, answer, started
from tests.stand_in_worker import MODEL, StandInWorker, expected_tokens


@pytest_asyncio.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def pair(**of_decode: object) -> tuple[StandInWorker, StandInWorker]:
    prefill = StandInWorker("p", "prefill", hands_over=True)
    return prefill, StandInWorker("d", "decode", hands_over=True, **of_decode)  # type: ignore[arg-type]


@pytest.mark.parametrize("prefill_delay_s", [0.0, 0.2])
async def test_the_decode_worker_is_asked_at_once_and_told_whom_to_follow(
    stack: AsyncExitStack, prefill_delay_s: float
) -> None:
    prefill, decode = pair()
    prefill.prefill_delay_s = prefill_delay_s
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    answered = await node.openai.completions.create(model=MODEL, prompt=LONG, max_tokens=10)
    assert answered.usage is not None
    assert answered.usage.model_dump()["stratakv"]["computed"] == len(LONG)
    assert prefill.requests[0]["kv_transfer_params"] == {"do_remote_decode": True, "is_followed": True}
    assert decode.requests[0]["kv_transfer_params"] == {
        "do_remote_prefill": True,
        "remote_url": prefill.url,
        "remote_request_id": prefill.requests[0]["request_id"],
    }
    assert await answer(node, 10, LONG[::-1]) == expected_tokens(LONG[::-1], 10)


async def test_a_worker_that_cannot_take_over_is_asked_after_the_other(stack: AsyncExitStack) -> None:
    prefill, decode = pair()
    decode.hands_over = False
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    assert await answer(node, 10, LONG) == expected_tokens(LONG, 10)
    assert decode.requests[0]["kv_transfer_params"]["output_token_ids"] == expected_tokens(LONG, 1)


async def test_an_answer_of_one_token_is_not_handed_over(stack: AsyncExitStack) -> None:
    prefill, decode = pair()
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    assert await answer(node, 1, LONG) == expected_tokens(LONG, 1)
    assert not decode.requests


async def test_what_cannot_be_handed_over_goes_on_where_it_was_computed(stack: AsyncExitStack) -> None:
    prefill, decode = pair(handover_fails=True)
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    assert await answer(node, 10, LONG) == expected_tokens(LONG, 10)
    assert prefill.requests[1]["kv_transfer_params"] == {"output_token_ids": expected_tokens(LONG, 1)}


@pytest.mark.parametrize("lost_after", [0, 4])
async def test_when_the_decode_worker_is_lost_the_answer_goes_on_elsewhere(
    stack: AsyncExitStack, lost_after: int
) -> None:
    prefill, decode = pair(lose_after_tokens=lost_after)
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    assert await answer(node, 10, LONG) == expected_tokens(LONG, 10)
    resumed = prefill.requests[1]["kv_transfer_params"]["output_token_ids"]
    assert resumed == expected_tokens(LONG, 1 + lost_after)


async def test_when_the_prefill_worker_is_lost_the_one_that_followed_it_is_let_go(stack: AsyncExitStack) -> None:
    prefill, decode = pair(token_delay_s=0.3)
    prefill.lose_prefills = True
    node = await started(stack, prefill, decode, meta=PoolOfBlocks())
    assert await answer(node, 3, LONG) == expected_tokens(LONG, 3)
    assert decode.cancelled == 1
    assert "kv_transfer_params" not in decode.requests[1]
