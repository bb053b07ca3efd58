"""HTTP to a worker, whoever made it: requests with a deadline, answers of bounded size, streams of server-sent events.

What breaks becomes one of the failures that `dbnode.worker_base` sorts. Base of `WorkerClient` and `VllmClient`.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import closing
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from dbnode.errors import WorkerLost, WorkerRefused, WorkerUnreachable
from dbnode.http_client import Answer, AnswerLost, EndpointGone, HttpClient
from stratakv.errors import DeadlineExceeded, StrataError

BODY_END_TIMEOUT_S = 1.0
ANSWER_BYTES_MAX = 8 * 1024 * 1024
"""Longest unfinished line, and longest answer that is not streamed."""

_DONE = b"[DONE]"
_NO_HEADERS: Mapping[str, str] = {}

Decoded = TypeVar("Decoded")


class EventStream:
    """An answer that comes as server-sent events; closing it gives the connection up unless it is complete."""

    def __init__(self, url: str, answer: Answer, deadline_s: float) -> None:
        self.url = url
        self._answer = answer
        self._deadline_s = deadline_s
        self._is_late = False
        self._is_done = False
        self._rest = b""
        """A line whose end is still to come."""
        # One timer for the answer: a timeout around each read would cost more than the read.
        self._timer = asyncio.get_running_loop().call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        self._is_late = True
        self._answer.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection up unless the answer is complete."""
        self._timer.cancel()
        self._answer.close()

    async def payloads(self) -> list[bytes]:
        """Data of the events that have come since, at least one; none once the one has come that says [DONE].

        Raises WorkerLost, WorkerRefused, DeadlineExceeded.
        """
        payloads: list[bytes] = []
        while not payloads and not self._is_done:
            try:
                data = await self._answer.read()
            except AnswerLost as error:
                raise self._failure(f"went away: {error}") from error
            if not data:
                raise self._failure("ended its answer too early")
            lines = (self._rest + data if self._rest else data).split(b"\n")
            self._rest = rest = lines.pop()
            if len(rest) > ANSWER_BYTES_MAX:
                raise WorkerRefused(f"{self.url} sent a line of more than {ANSWER_BYTES_MAX} bytes")
            payloads = [line[5:].strip() for line in lines if line.startswith(b"data:")]
            if _DONE in payloads:
                self._is_done = True
                del payloads[payloads.index(_DONE) :]
        if not payloads:
            await self._end()
        return payloads

    async def _end(self) -> None:
        """Read the end of the body, so that the connection can serve the next request."""
        if self._answer.is_complete:
            return
        with contextlib.suppress(TimeoutError, AnswerLost):
            async with asyncio.timeout(BODY_END_TIMEOUT_S):
                await self._answer.read()

    def _failure(self, what: str) -> StrataError:
        if self._is_late:
            return DeadlineExceeded("the request's deadline passed")
        return WorkerLost(f"{self.url} {what}")


class HttpDoor(ABC):
    """Connections to workers. Used from one event loop."""

    def __init__(self) -> None:
        self._http = HttpClient()  # admission bounds the requests

    async def close(self) -> None:
        self._http.close()

    @abstractmethod
    async def _ask(
        self, method: str, url: str, path: str, body: bytes = b"", headers: Mapping[str, str] = _NO_HEADERS
    ) -> Answer:
        """One request, as this maker's workers want it."""

    @abstractmethod
    def _refusal(self, url: str, status: int, body: bytes) -> StrataError:
        """The error a worker answered with."""

    async def _get(self, url: str, path: str, timeout_s: float) -> bytes:
        """Raises WorkerUnreachable."""
        try:
            async with asyncio.timeout(timeout_s):
                with closing(await self._ask("GET", url, path)) as answer:
                    if answer.status != 200:
                        raise WorkerUnreachable(self._no_answer(url, path, answer.status))
                    return await read_body(url, answer)
        except (AnswerLost, EndpointGone, TimeoutError) as error:
            raise WorkerUnreachable(f"{url}: {type(error).__name__}") from error

    def _no_answer(self, url: str, path: str, status: int) -> str:
        return f"{url}{path} answers with status {status}"

    async def _post(self, url: str, path: str, body: bytes, timeout_s: float) -> bytes:
        """Raises WorkerUnreachable or what the worker says."""
        try:
            async with asyncio.timeout(timeout_s):
                with closing(await self._ask("POST", url, path, body, _JSON)) as answer:
                    told = await read_body(url, answer)
                    if answer.status != 200:
                        raise self._refusal(url, answer.status, told)
                    return told
        except (AnswerLost, EndpointGone, TimeoutError) as error:
            raise WorkerUnreachable(f"{url}: {type(error).__name__}") from error

    async def _complete(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """POST /v1/completions, whose answer has begun. Raises what `dbnode.worker_base` says; the caller limits the time."""
        try:
            answer = await self._ask("POST", url, "/v1/completions", body, {**_JSON, **headers})
            if answer.status == 200:
                return answer
            with closing(answer):
                raise self._refusal(url, answer.status, await read_body(url, answer))
        except EndpointGone as error:
            raise WorkerUnreachable(f"{url} cannot be reached: {error}") from error
        except AnswerLost as error:
            raise WorkerLost(f"{url} went away: {error}") from error


_JSON = {"Content-Type": "application/json"}


async def read_body(url: str, answer: Answer) -> bytes:
    """The whole body of an answer that is not streamed."""
    parts: list[bytes] = []
    size_bytes = 0
    while part := await answer.read():
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
