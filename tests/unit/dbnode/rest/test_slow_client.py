"""A client that does not read gives its place up, and one that reads slowly keeps it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dbnode.rest.sending import PartSender
from stratakv.errors import Cancelled

TIMEOUT_S = 0.02


async def test_a_client_that_reads_nothing_is_given_up() -> None:
    async def never_sent(message: object) -> None:
        await asyncio.Event().wait()

    parts = PartSender(never_sent, TIMEOUT_S)
    with pytest.raises(Cancelled):
        await parts.send(b"data: x\n\n")
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_time_between_parts_does_not_count() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message["body"])

    parts = PartSender(send, TIMEOUT_S)
    for part in (b"1", b"2"):
        await parts.send(part)
        await asyncio.sleep(3 * TIMEOUT_S)
    parts.close()
    assert sent == [b"1", b"2"]


async def test_whoever_cancels_the_answer_is_heard() -> None:
    async def never_sent(message: object) -> None:
        await asyncio.Event().wait()

    async def answer() -> None:
        parts = PartSender(never_sent)
        try:
            await parts.send(b"x")
        finally:
            parts.close()

    task = asyncio.create_task(answer())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
