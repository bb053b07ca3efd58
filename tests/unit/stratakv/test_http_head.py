"""A connection that says nothing, or never ends its headers, is closed; one that does is served as before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from stratakv import http_head
from stratakv.http_server import HttpServer

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers when the body is whole."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest_asyncio.fixture
async def port() -> AsyncIterator[int]:
    server = HttpServer("127.0.0.1", 0, "rest")
    running = asyncio.create_task(server.run(app))
    yield server.port
    server.stop()
    await running


async def said(port: int, *parts: bytes) -> bytes:
    """All that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("begun", [b"", HEAD, HEAD + b"\r\n" + HEAD])
async def test_a_request_that_does_not_begin_in_time_ends_the_connection(
    port: int, begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_head, "HEAD_TIMEOUT_S", 0.1)
    assert (await said(port, begun)).count(b"HTTP/1.1 200") == begun.count(b"\r\n\r\n")


async def test_headers_that_do_not_end_are_refused(port: int) -> None:
    endless = HEAD + b"X: " + b"a" * (http_head.HEAD_BYTES_MAX + 1)
    assert (await said(port, endless)).startswith(b"HTTP/1.1 400")


async def test_time_and_size_are_of_the_head_alone(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_head, "HEAD_TIMEOUT_S", 0.1)
    body = b"x" * (http_head.HEAD_BYTES_MAX * 2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
        writer.write(body[:-1])
        await asyncio.sleep(0.2)
        writer.write(body[-1:])
        assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.2)
    writer.close()
