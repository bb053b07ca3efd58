"""HTTP to a worker, whoever made it: requests with a deadline, answers of bounded size, streams of server-sent events.

What breaks becomes one of the failures that `dbnode.worker_base` sorts. Base of `WorkerClient` and `VllmClient`.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
import msgspec

from dbnode.errors import WorkerLost, WorkerRefused, WorkerUnreachable
from stratakv.errors import DeadlineExceeded, StrataError

CONNECT_TIMEOUT_S = 2.0
BODY_END_TIMEOUT_S = 1.0
ANSWER_BYTES_MAX = 8 * 1024 * 1024
"""Longest unfinished line, and longest answer that is not streamed."""

ENDPOINT_GONE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
CONNECTION_LOST = (aiohttp.ClientError, ConnectionError)
_DONE = b"[DONE]"
_NO_HEADERS: Mapping[str, str] = {}

Decoded = TypeVar("Decoded")


class EventStream:
    """An answer that comes as server-sent events; closing it gives the connection up unless it is complete."""

    def __init__(self, url: str, response: aiohttp.ClientResponse, deadline_s: float) -> None:
        self.url = url
        self._response = response
        self._deadline_s = deadline_s
        self._is_late = False
        # One timer for the answer: a timeout around each read would cost more than the read.
        self._timer = asyncio.get_running_loop().call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        self._is_late = True
        self._response.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection up unless the answer is complete."""
        self._timer.cancel()
        if not self._response.content.is_eof():
            self._response.close()
        self._response.release()

    async def payloads(self) -> AsyncGenerator[bytes, None]:
        """Data of the events, one by one; otherwise as `batches`."""
        async with aclosing(self.batches()) as batches:
            async for batch in batches:
                for payload in batch:
                    yield payload

    async def batches(self) -> AsyncGenerator[list[bytes], None]:
        """Data of the events that came together, up to the one that says [DONE].

        Raises WorkerLost, WorkerRefused, DeadlineExceeded.
        """
        rest = b""
        while True:
            data = await self._read()
            if not data:
                raise self._failure("ended its answer too early")
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > ANSWER_BYTES_MAX:
                raise WorkerRefused(f"{self.url} sent a line of more than {ANSWER_BYTES_MAX} bytes")
            payloads = [line[5:].strip() for line in lines if line.startswith(b"data:")]
            is_done = _DONE in payloads
            if is_done:
                del payloads[payloads.index(_DONE) :]
            if payloads:
                yield payloads
            if is_done:
                await self._end()
                return

    async def _end(self) -> None:
        """Read the end of the body, so that the connection can serve the next request."""
        with contextlib.suppress(TimeoutError, *CONNECTION_LOST):
            async with asyncio.timeout(BODY_END_TIMEOUT_S):
                await self._response.content.readany()

    async def _read(self) -> bytes:
        try:
            return await self._response.content.readany()
        except CONNECTION_LOST as error:
            raise self._failure(f"went away: {type(error).__name__}") from error

    def _failure(self, what: str) -> StrataError:
        if self._is_late:
            return DeadlineExceeded("the request's deadline passed")
        return WorkerLost(f"{self.url} {what}")


class HttpDoor(ABC):
    """Connections to workers. Used from one event loop."""

    def __init__(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)  # admission bounds the requests
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)

    async def close(self) -> None:
        await self._session.close()

    @abstractmethod
    async def _ask(
        self, method: str, url: str, path: str, body: bytes = b"", headers: Mapping[str, str] = _NO_HEADERS
    ) -> aiohttp.ClientResponse:
        """One request, as this maker's workers want it."""

    @abstractmethod
    def _refusal(self, url: str, status: int, body: bytes) -> StrataError:
        """The error a worker answered with."""

    async def _get(self, url: str, path: str, timeout_s: float) -> bytes:
        """Raises WorkerUnreachable."""
        try:
            async with asyncio.timeout(timeout_s), await self._ask("GET", url, path) as response:
                if response.status != 200:
                    raise WorkerUnreachable(self._no_answer(url, path, response.status))
                return await read_body(url, response)
        except (*CONNECTION_LOST, TimeoutError) as error:
            raise WorkerUnreachable(f"{url}: {type(error).__name__}") from error

    def _no_answer(self, url: str, path: str, status: int) -> str:
        return f"{url}{path} answers with status {status}"

    async def _post(self, url: str, path: str, body: bytes, timeout_s: float) -> bytes:
        """Raises WorkerUnreachable or what the worker says."""
        try:
            async with asyncio.timeout(timeout_s), await self._ask("POST", url, path, body, _JSON) as response:
                answer = await read_body(url, response)
                if response.status != 200:
                    raise self._refusal(url, response.status, answer)
                return answer
        except (*CONNECTION_LOST, TimeoutError) as error:
            raise WorkerUnreachable(f"{url}: {type(error).__name__}") from error

    async def _complete(
        self, url: str, body: bytes, headers: Mapping[str, str], deadline_s: float
    ) -> aiohttp.ClientResponse:
        """POST /v1/completions, whose answer has begun. Raises what `dbnode.worker_base` says."""
        try:
            async with asyncio.timeout_at(deadline_s):
                response = await self._ask("POST", url, "/v1/completions", body, {**_JSON, **headers})
                if response.status == 200:
                    return response
                async with response:
                    raise self._refusal(url, response.status, await read_body(url, response))
        except TimeoutError as error:
            if isinstance(error, ENDPOINT_GONE):
                raise WorkerUnreachable(f"{url} does not answer") from error
            raise DeadlineExceeded("the request's deadline passed") from None
        except ENDPOINT_GONE as error:
            raise WorkerUnreachable(f"{url} cannot be reached: {type(error).__name__}") from error
        except CONNECTION_LOST as error:
            raise WorkerLost(f"{url} went away: {type(error).__name__}") from error


_JSON = {"Content-Type": "application/json"}


async def read_body(url: str, response: aiohttp.ClientResponse) -> bytes:
    """The whole body of an answer that is not streamed."""
    parts: list[bytes] = []
    size_bytes = 0
    async for part in response.content.iter_any():
        size_bytes += len(part)
        if size_bytes > ANSWER_BYTES_MAX:
            raise WorkerRefused(f"{url} sent more than {ANSWER_BYTES_MAX} bytes")
        parts.append(part)
    return b"".join(parts)


def decode_state(url: str, decode: Callable[[bytes], Decoded], body: bytes) -> Decoded:
    """Raises WorkerUnreachable for what is no answer of a worker."""
    try:
        return decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkerUnreachable(f"{url} is no worker: {error}") from None
