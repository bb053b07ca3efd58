"""HTTP/1.1 to workers over kept connections: an answer's body is read as it arrives. Owned by `dbnode.worker_http`.

As little as a token's way allows: what arrives is parsed where it is received, and whoever reads an answer is woken once. An answer
that is not read holds its worker up rather than fill memory.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Mapping
from typing import cast
from urllib.parse import urlsplit

import httptools

CONNECT_TIMEOUT_S = 2.0
KEEP_ALIVE_S = 60.0
"""A connection that was not used for so long is not used again."""
HEAD_BYTES_MAX = 64 * 1024
UNREAD_BYTES_MAX = 256 * 1024
"""Of an answer; its connection is not read while there is more."""
ENDPOINTS_MAX = 2048
"""Addresses remembered; those that were asked first are forgotten first."""
_NO_HEADERS: Mapping[str, str] = {}
_LINE_ENDS = frozenset("\r\n")
_PORTS = {"http": 80, "https": 443}


class EndpointGone(ConnectionError):
    """No connection could be made."""


class EndpointSilent(EndpointGone, TimeoutError):
    """Nothing said whether a connection can be made."""


class AnswerLost(ConnectionError):
    """The connection ended or told nonsense before the answer was complete."""


class Answer:
    """What one request is answered with."""

    __slots__ = (
        "_connection",
        "_error",
        "_loop",
        "_num_unread",
        "_parts",
        "_waiter",
        "headers",
        "is_complete",
        "status",
    )

    def __init__(self, connection: _Connection) -> None:
        self.status = 0
        """0 until the head is there."""
        self.headers: dict[bytes, bytes] = {}
        """Names in lower case."""
        self.is_complete = False
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._num_unread = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: AnswerLost | None = None

    async def begins(self) -> None:
        """Wait for the head. Raises AnswerLost."""
        while not self.status:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            await self._waiter

    async def read(self) -> bytes:
        """What has arrived since the last time, at least a byte; nothing at the end. Raises AnswerLost."""
        parts = self._parts
        while not parts:
            if self.is_complete:
                return b""
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            await self._waiter
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self._num_unread > UNREAD_BYTES_MAX:
            self._connection.resume(self)
        self._num_unread = 0
        return data

    def close(self) -> None:
        """Give the connection up unless the answer is complete."""
        if not self.is_complete:
            self._connection.abort()

    def take(self, part: bytes) -> bool:
        """Of the body. Whether there is room for more."""
        self._parts.append(part)
        self._num_unread += len(part)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return self._num_unread <= UNREAD_BYTES_MAX

    def end(self) -> None:
        self.is_complete = True
        self.wake()

    def fail(self, error: AnswerLost) -> None:
        self._error = error
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One connection; its requests come one after another."""

    def __init__(self, endpoint: _Endpoint) -> None:
        self._endpoint = endpoint
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._headers: dict[bytes, bytes] = {}
        self._num_head_bytes = 0
        self._is_paused = False
        self.idle_since_s = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes) -> Answer:
        assert self._transport is not None
        assert self._answer is None
        self._answer = answer = Answer(self)
        self._headers, self._num_head_bytes = {}, 0  # what came behind the last body is of no interest
        self._transport.write(request)
        return answer

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def resume(self, answer: Answer | None) -> None:
        """There is room again for what arrives of it."""
        if self._is_paused and answer is self._answer and self._transport is not None and self.is_open:
            self._is_paused = False
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # nobody has asked for this
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lose(f"sent what is no HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._endpoint.forget(self)
        answer = self._answer
        if answer is None:
            return
        is_told_length = b"content-length" in answer.headers or b"transfer-encoding" in answer.headers
        if answer.status and not is_told_length and exc is None:
            self._answer = None
            answer.end()  # its length is told by its end only
        else:
            self._lose("closed the connection" if exc is None else type(exc).__name__)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_head_bytes += len(name) + len(value)
        if self._num_head_bytes > HEAD_BYTES_MAX:
            raise ValueError(f"more than {HEAD_BYTES_MAX} bytes of headers")
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._answer is None:
            raise ValueError("nobody has asked for another answer")
        self._answer.headers, self._headers, self._num_head_bytes = self._headers, {}, 0
        status = self._parser.get_status_code()
        if status >= 200:
            self._answer.status = status
            self._answer.wake()

    def on_body(self, body: bytes) -> None:
        if self._answer is None or self._answer.take(body) or self._is_paused or self._transport is None:
            return
        self._is_paused = True
        self._transport.pause_reading()

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is None or not answer.status:  # there is more to come after an interim answer
            return
        self._answer = None
        answer.end()
        if self._parser.should_keep_alive() and self.is_open:
            self.resume(None)
            self._endpoint.keep(self)
        else:
            self.abort()

    def _lose(self, why: str) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.fail(AnswerLost(why))
        self.abort()


class _Endpoint:
    """A worker's address, and the connections to it that are not in use."""

    def __init__(self, url: str) -> None:
        """Raises EndpointGone for what is no address."""
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        except (KeyError, ValueError):
            raise EndpointGone(f"{url} is no address of HTTP") from None
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/")
        self._host_header = parts.netloc.rpartition("@")[2]
        self._idle: deque[_Connection] = deque()
        self._is_closed = False

    @property
    def num_kept(self) -> int:
        return len(self._idle)

    async def ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        connection = self._kept() or await self._connect()
        lines = [f"{method} {self._path}{path} HTTP/1.1", f"Host: {self._host_header}"]
        for name, value in headers.items():
            assert not _LINE_ENDS & set(value), name
            lines.append(f"{name}: {value}")
        if body or method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        answer = connection.ask("\r\n".join([*lines, "", ""]).encode() + body)
        try:
            await answer.begins()
        except BaseException:
            answer.close()
            raise
        return answer

    def keep(self, connection: _Connection) -> None:
        if self._is_closed:
            connection.abort()
            return
        connection.idle_since_s = now_s = time.monotonic()
        self._idle.append(connection)
        while now_s - self._idle[0].idle_since_s > KEEP_ALIVE_S:
            self._idle.popleft().abort()

    def forget(self, connection: _Connection) -> None:
        """It has ended."""
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        self._is_closed = True
        while self._idle:
            self._idle.pop().abort()

    def _kept(self) -> _Connection | None:
        """The one that was used last, if any."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and time.monotonic() - connection.idle_since_s <= KEEP_ALIVE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        """Raises EndpointGone."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise EndpointSilent(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise EndpointGone(str(error)) from error
        if not connection.is_open:
            raise EndpointGone("the connection was closed at once")
        return connection


class HttpClient:
    """Connections to any number of addresses. Used from one event loop; who uses it bounds how many requests there are at once."""

    def __init__(self) -> None:
        self._endpoints: dict[str, _Endpoint] = {}

    @property
    def num_kept(self) -> int:
        """Connections that are open and not in use."""
        return sum(endpoint.num_kept for endpoint in self._endpoints.values())

    async def ask(
        self, method: str, url: str, path: str, body: bytes = b"", headers: Mapping[str, str] = _NO_HEADERS
    ) -> Answer:
        """An answer whose head is there; to be read to its end, or closed. Raises EndpointGone, AnswerLost."""
        endpoint = self._endpoints.get(url)
        if endpoint is None:
            endpoint = self._endpoints[url] = _Endpoint(url)
            if len(self._endpoints) > ENDPOINTS_MAX:
                self._endpoints.pop(next(iter(self._endpoints))).close()
        return await endpoint.ask(method, path, body, headers)

    def close(self) -> None:
        for endpoint in self._endpoints.values():
            endpoint.close()
