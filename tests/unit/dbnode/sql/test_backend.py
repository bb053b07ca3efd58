"""Reaching PostgreSQL: what the URL asks for, and servers that answer a request for TLS in every way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dbnode.sql.backend import BackendAddress
from dbnode.sql.errors import BackendUnreachable
from dbnode.sql.startup import TLS_REQUEST
from stratakv.errors import SetupError
from tests.certificates import write_certificate


class _Hearing(asyncio.Protocol):
    """A client that keeps what it is told."""

    def __init__(self) -> None:
        self.heard = b""
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard += data

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)


@asynccontextmanager
async def _server(*answers: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Port of a server, and what it is asked: the n-th connection gets the n-th answer to its first bytes and is closed."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = answers[len(asked)]
        asked.append(await reader.read(len(TLS_REQUEST)) if answer else b"")
        writer.write(answer)
        await writer.drain()
        if answer == b"S":
            await reader.read(1)  # the handshake begins, and is answered by nonsense
            writer.write(b"no TLS here")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked


async def _connect(port: int, sslmode: str) -> _Hearing:
    return await BackendAddress.from_url(f"postgresql://127.0.0.1:{port}/?sslmode={sslmode}").connect(_Hearing)


@pytest.mark.parametrize("sslmode", ["require", "verify-full&sslrootcert=system"])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"N", "does not support TLS"),
        (b"S", "TLS fails"),
        (b"E\0\0\0\5\0", "not understood"),
        (b"Sslipped in", "not understood"),
        (b"", "closed the connection|reset by peer"),
    ],
)
async def test_without_tls_that_is_demanded_nothing_is_sent(sslmode: str, answer: bytes, reason: str) -> None:
    async with _server(answer) as (port, asked):
        with pytest.raises(BackendUnreachable, match=reason):
            await _connect(port, sslmode)
    assert asked in ([TLS_REQUEST], [b""])


async def test_preferred_tls_that_is_declined_is_done_without() -> None:
    async with _server(b"N") as (port, asked):
        protocol = await _connect(port, "prefer")
        await protocol.ended
    assert asked == [TLS_REQUEST]
    assert protocol.heard == b""


async def test_preferred_tls_that_fails_is_done_without_on_another_connection() -> None:
    async with _server(b"S", b"hello") as (port, asked):
        connecting = asyncio.create_task(_connect(port, "prefer"))
        protocol = await connecting
        protocol.transport.write(b"12345678")  # type: ignore[attr-defined]
        await protocol.ended
    assert asked == [TLS_REQUEST, b"12345678"]
    assert protocol.heard == b"hello"


async def test_what_is_slipped_in_after_the_answer_is_refused_also_where_tls_is_only_preferred() -> None:
    async with _server(b"Sslipped in") as (port, _):
        with pytest.raises(BackendUnreachable, match="not understood"):
            await _connect(port, "prefer")


@pytest.mark.parametrize(
    ("url", "has_tls"),
    [
        ("postgresql://db.example/shop", True),
        ("postgresql://db.example/shop?sslmode=disable", False),
        ("postgresql://127.0.0.1/shop", False),
        ("postgresql://localhost/shop", False),
        ("postgresql://127.0.0.1/shop?sslmode=require", True),
        ("postgresql:///shop?host=/run/postgresql&sslmode=require", False),
    ],
)
def test_tls_is_preferred_beyond_this_machine(url: str, has_tls: bool) -> None:
    assert (BackendAddress.from_url(url).tls is not None) is has_tls


def test_root_certificates_make_a_demand_for_tls_a_check(tmp_path: Path) -> None:
    """As libpq does it."""
    root = write_certificate(tmp_path, "root").certificate
    for mode, checks in {"require": True, "verify-ca": True, "verify-full": True, "prefer": False}.items():
        tls = BackendAddress.from_url(f"postgresql://h/?sslmode={mode}&sslrootcert={root}").tls
        assert tls is not None
        assert (bool(tls.context.verify_mode), tls.context.check_hostname) == (checks, mode == "verify-full")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("sslmode=strict", "expected one of disable"),
        ("sslmode=verify-full&sslrootcert=/nowhere", "/nowhere: No such file"),
        ("sslmode=verify-full&sslrootcert=/dev/null", "no certificates in it"),
        ("sslmode=require&sslcert=/nowhere", "/nowhere cannot be used"),
    ],
)
def test_mistakes_in_the_url_are_named(query: str, expected: str) -> None:
    with pytest.raises(SetupError, match=expected):
        BackendAddress.from_url(f"postgresql://h/?{query}")
