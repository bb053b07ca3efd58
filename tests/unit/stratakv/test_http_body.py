"""Request bodies are read up to a limit and no further."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request

from stratakv import http_body
from stratakv.errors import Cancelled
from stratakv.http_body import BodyTooLarge, BodyTooSlow, read_body

Receive = Callable[[], Awaitable[dict[str, Any]]]


def _request(*messages: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None) -> Request:
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    return Request({"type": "http", "method": "POST", "headers": headers or []}, receive)


def _part(body: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_parts_are_put_together_up_to_the_limit() -> None:
    assert await read_body(_request(_part(b"ab", more=True), _part(b"c", more=False)), 3) == b"abc"
    assert await read_body(_request(_part(b"", more=False)), 3) == b""


async def test_more_than_the_limit_is_refused_before_the_rest_is_read() -> None:
    with pytest.raises(BodyTooLarge):
        await read_body(_request(_part(b"abcd", more=True)), 3)
    with pytest.raises(BodyTooLarge):
        await read_body(_request(headers=[(b"content-length", b"4")]), 3)


async def test_a_client_that_goes_away_or_sends_nothing_more_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Cancelled):
        await read_body(_request(_part(b"a", more=True), {"type": "http.disconnect"}), 3)
    monkeypatch.setattr(http_body, "BODY_TIMEOUT_S", 0.0)
    with pytest.raises(BodyTooSlow):
        await read_body(_request(_part(b"a", more=True)), 3)
