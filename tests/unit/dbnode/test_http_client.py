"""The HTTP client of workers, against a server that sends what a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from dbnode.http_client import HEAD_BYTES_MAX, UNREAD_BYTES_MAX, Answer, AnswerLost, EndpointGone, HttpClient
from tests.support import eventually_async

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SHORT = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Server:
    """What it was asked, and by how many connections."""

    url: str = ""
    heads: list[bytes] = field(default_factory=list)
    connections: int = 0
    ended: int = 0


Behave = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(behave: Behave) -> AsyncIterator[tuple[Server, HttpClient]]:
    server, client = Server(), HttpClient()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            while True:
                server.heads.append(await reader.readuntil(b"\r\n\r\n"))
                await behave(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            server.ended += 1
        finally:
            writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    yield server, client
    client.close()
    listener.close()


def sends(*parts: bytes) -> Behave:
    async def behave(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return behave


async def body_of(answer: Answer) -> bytes:
    parts = []
    while part := await answer.read():
        parts.append(part)
    return b"".join(parts)


async def test_a_connection_whose_answer_is_complete_serves_the_next_request() -> None:
    async with serving(sends(SHORT)) as (server, client):
        for _ in range(3):
            answer = await client.ask("GET", server.url, "/load", headers={"X-Request-Id": "r1"})
            assert (answer.status, answer.headers[b"content-length"], await body_of(answer)) == (200, b"2", b"ok")
        assert server.connections == 1
        assert server.heads[0].startswith(b"GET /load HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"\r\nX-Request-Id: r1\r\n" in server.heads[0]


async def test_an_answer_in_pieces_is_read_as_it_comes() -> None:
    async with serving(sends(CHUNKED[:20], CHUNKED[20:], b"3\r\nab", b"c\r\n", b"1\r\nd\r\n0\r\n\r\n")) as (
        server,
        client,
    ):
        assert await body_of(await client.ask("GET", server.url, "/")) == b"abcd"
        assert await body_of(await client.ask("GET", server.url, "/")) == b"abcd"
        assert server.connections == 1


async def test_what_stands_behind_a_body_is_not_taken_for_the_next_head() -> None:
    trailed = CHUNKED + b"1\r\na\r\n0\r\nX-Checksum: 1\r\n\r\n"
    async with serving(sends(trailed)) as (server, client):
        for _ in range(2):
            answer = await client.ask("GET", server.url, "/")
            assert await body_of(answer) == b"a"
            assert answer.headers == {b"transfer-encoding": b"chunked"}
        assert server.connections == 1


async def test_an_answer_whose_end_is_the_connections_is_whole() -> None:
    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall of it")
        writer.close()

    async with serving(behave) as (server, client):
        assert await body_of(await client.ask("GET", server.url, "/")) == b"all of it"


async def test_interim_answers_are_passed_over() -> None:
    async with serving(sends(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", SHORT)) as (server, client):
        answer = await client.ask("GET", server.url, "/")
        assert (answer.status, await body_of(answer)) == (200, b"ok")


async def test_what_came_before_a_connection_broke_is_read_first() -> None:
    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"3\r\nabc\r\n")
        writer.close()

    async with serving(behave) as (server, client):
        answer = await client.ask("GET", server.url, "/")
        assert await answer.read() == b"abc"
        with pytest.raises(AnswerLost):
            await answer.read()


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * HEAD_BYTES_MAX + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
    ],
)
async def test_what_is_no_answer_is_refused(said: bytes) -> None:
    async with serving(sends(said)) as (server, client):
        with pytest.raises(AnswerLost):
            await client.ask("GET", server.url, "/")
        await eventually_async(lambda: server.ended == 1)


async def test_a_second_answer_that_nobody_asked_for_costs_the_connection() -> None:
    async with serving(sends(SHORT + SHORT)) as (server, client):
        for _ in range(2):
            assert await body_of(await client.ask("GET", server.url, "/")) == b"ok"
        assert server.connections == 2


async def test_closing_an_answer_before_its_end_ends_its_connection() -> None:
    async with serving(sends(CHUNKED)) as (server, client):
        answer = await client.ask("GET", server.url, "/")
        answer.close()
        with pytest.raises(AnswerLost):
            await answer.read()
        await eventually_async(lambda: server.ended == 1)


async def test_a_request_that_is_given_up_before_its_answer_ends_its_connection() -> None:
    async with serving(sends(b"")) as (server, client):
        asking = asyncio.create_task(client.ask("GET", server.url, "/"))
        await eventually_async(lambda: len(server.heads) == 1)
        asking.cancel()
        await eventually_async(lambda: server.ended == 1)


async def test_an_answer_that_is_not_read_holds_its_sender_up() -> None:
    sent = 0

    async def behave(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(CHUNKED)
        for _ in range(1024):
            writer.write(b"8000\r\n" + bytes(0x8000) + b"\r\n")
            await writer.drain()
            sent += 0x8000
        writer.write(b"0\r\n\r\n")

    async with serving(behave) as (server, client):
        answer = await client.ask("GET", server.url, "/")
        seen = -1

        def has_stopped() -> bool:
            nonlocal seen
            before, seen = seen, sent
            return before == sent

        await eventually_async(has_stopped)
        assert sent < 1024 * 0x8000
        assert UNREAD_BYTES_MAX < len(await answer.read()) < 2 * UNREAD_BYTES_MAX + 0x10000
        await body_of(answer)
        assert sent == 1024 * 0x8000
        assert answer.is_complete


async def test_a_kept_connection_that_the_server_has_closed_is_not_used_again() -> None:
    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(SHORT)
        writer.close()

    async with serving(behave) as (server, client):
        for number in range(1, 4):
            assert await body_of(await client.ask("GET", server.url, "/")) == b"ok"
            await eventually_async(lambda: not client.num_kept)
            assert server.connections == number


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://127.0.0.1:1", "http://127.0.0.1:port", "127.0.0.1"])
async def test_an_address_where_nobody_listens_is_told_apart_from_a_lost_answer(url: str) -> None:
    with pytest.raises(EndpointGone):
        await HttpClient().ask("GET", url, "/")
