"""HTTP client of one or many workers: completions as they stream, state, cache control.

The form is OpenAI's completions with token ids and `kv_transfer_params`, so that a vLLM server can stand in a worker's place.
Failures are sorted by what may be done about them: `WorkerUnreachable` (not seen by the worker), `WorkerRefused` (seen, not
done), `WorkerLost` (the worker went away with the request in hand); anything else is the answer that the client gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
import msgspec

from dbnode.errors import HandoverFailed, WorkerLost, WorkerRefused, WorkerUnreachable
from dbnode.worker_messages import UsageOptions, WorkerChunk, WorkerError, WorkerFacts, WorkerRequest
from stratakv.errors import DeadlineExceeded, InvalidRequest, Overloaded, StrataError
from stratakv.keys import NAMESPACE_BYTES
from stratakv.pool.auth import PoolCredentials, RequestSigner
from stratakv.wire import WorkerLoad

CONNECT_TIMEOUT_S = 2.0
BODY_END_TIMEOUT_S = 1.0
ANSWER_BYTES_MAX = 8 * 1024 * 1024
"""Longest unfinished line, and longest answer that is not streamed."""

_NAMESPACE = re.compile(rf"[0-9a-f]{{{2 * NAMESPACE_BYTES}}}")
ENDPOINT_GONE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
CONNECTION_LOST = (aiohttp.ClientError, ConnectionError)
_NO_HEADERS: Mapping[str, str] = {}

State = TypeVar("State", WorkerFacts, WorkerLoad)

_encode = msgspec.json.Encoder().encode
_decode_chunk = msgspec.json.Decoder(WorkerChunk).decode
_decode_facts = msgspec.json.Decoder(WorkerFacts).decode
_decode_load = msgspec.json.Decoder(WorkerLoad).decode


class WorkerStream:
    """A running completion; closing it, at any time, cancels it in the worker."""

    def __init__(self, url: str, response: aiohttp.ClientResponse, deadline_s: float) -> None:
        self._url = url
        self._response = response
        self._deadline_s = deadline_s

    async def __aenter__(self) -> WorkerStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection up unless the answer is complete."""
        if not self._response.content.is_eof():
            self._response.close()
        self._response.release()

    async def chunks(self) -> AsyncGenerator[WorkerChunk, None]:
        """Events until the worker says that it is done. Raises WorkerLost, or the error the worker reports."""
        rest = b""
        while True:
            data = await self._read()
            if not data:
                raise WorkerLost(f"{self._url} ended its answer too early")
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > ANSWER_BYTES_MAX:
                raise WorkerRefused(f"{self._url} sent a line of more than {ANSWER_BYTES_MAX} bytes")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    await self._end()
                    return
                yield _checked(self._url, payload)

    async def _end(self) -> None:
        """Read the end of the body, so that the connection can serve the next request."""
        with contextlib.suppress(TimeoutError, *CONNECTION_LOST):
            async with asyncio.timeout(BODY_END_TIMEOUT_S):
                await self._response.content.readany()

    async def _read(self) -> bytes:
        try:
            async with asyncio.timeout_at(self._deadline_s):
                return await self._response.content.readany()
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed") from None
        except CONNECTION_LOST as error:
            raise WorkerLost(f"{self._url} went away: {type(error).__name__}") from error


class WorkerClient:
    """Connections to all workers. Used from one event loop."""

    def __init__(self, credentials: PoolCredentials | None = None) -> None:
        self._signer = RequestSigner(credentials) if credentials is not None else None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)  # admission bounds the requests
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)

    async def close(self) -> None:
        await self._session.close()

    async def stream(self, url: str, request: WorkerRequest, deadline_s: float) -> WorkerStream:
        """Start a streamed completion. Raises before the first event what the module's docstring says."""
        request = msgspec.structs.replace(request, stream=True, stream_options=UsageOptions(), return_token_ids=True)
        return WorkerStream(url, await self._post(url, request, deadline_s), deadline_s)

    async def info(self, url: str, timeout_s: float) -> WorkerFacts:
        """Who the worker is. Raises WorkerUnreachable."""
        facts = _decode_state(url, _decode_facts, await self._get(url, "/info", timeout_s))
        if not _NAMESPACE.fullmatch(facts.namespace) or facts.block_size < 1:
            raise WorkerUnreachable(f"{url} is no worker: its namespace or block size is wrong")
        return facts

    async def check_ready(self, url: str, timeout_s: float) -> None:
        """Return if the worker takes requests. Raises WorkerUnreachable while it is warming up or cannot be reached."""
        await self._get(url, "/ready", timeout_s)

    async def load(self, url: str, timeout_s: float) -> WorkerLoad:
        """How busy the worker is. Raises WorkerUnreachable."""
        return _decode_state(url, _decode_load, await self._get(url, "/load", timeout_s))

    async def drop_cache(self, url: str, body: bytes, timeout_s: float) -> dict[str, Any]:
        """Make a worker forget tiers. Raises WorkerUnreachable or what the worker says."""
        try:
            async with asyncio.timeout(timeout_s), await self._ask("POST", url, "/cache/drop", body) as response:
                answer = await _body(url, response)
                if response.status != 200:
                    raise _refusal(url, response.status, answer)
                return msgspec.json.decode(answer, type=dict[str, Any])
        except (*CONNECTION_LOST, TimeoutError) as error:
            raise WorkerUnreachable(f"{url}: {type(error).__name__}") from error

    async def _ask(
        self, method: str, url: str, path: str, body: bytes = b"", headers: Mapping[str, str] = _NO_HEADERS
    ) -> aiohttp.ClientResponse:
        """One request; signed again, once, where a worker that knows the pool's secret has a new challenge."""
        if self._signer is None:
            return await self._session.request(method, url + path, data=body or None, headers=headers)
        for _ in range(2):
            signed = self._signer.sign(url, method, path, body)
            response = await self._session.request(
                method, url + path, data=body or None, headers={**headers, **signed.headers}
            )
            challenge = response.headers.get("WWW-Authenticate")
            if response.status != 401 or not self._signer.learn(url, signed, challenge):
                break
            response.release()
        return response

    async def _get(self, url: str, path: str, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s), await self._ask("GET", url, path) as response:
                if response.status == 401:
                    raise WorkerUnreachable(f"{url} does not know this node: give both the same pool.secret")
                if response.status != 200:
                    raise WorkerUnreachable(f"{url}{path} answers with status {response.status}")
                return await _body(url, response)
        except (*CONNECTION_LOST, TimeoutError) as error:
            raise WorkerUnreachable(f"{url}: {type(error).__name__}") from error

    async def _post(self, url: str, request: WorkerRequest, deadline_s: float) -> aiohttp.ClientResponse:
        headers = {"Content-Type": "application/json", "X-Request-Id": request.request_id}
        try:
            async with asyncio.timeout_at(deadline_s):
                response = await self._ask("POST", url, "/v1/completions", _encode(request), headers)
                if response.status == 200:
                    return response
                async with response:
                    raise _refusal(url, response.status, await _body(url, response))
        except TimeoutError as error:
            if isinstance(error, ENDPOINT_GONE):
                raise WorkerUnreachable(f"{url} does not answer") from error
            raise DeadlineExceeded("the request's deadline passed") from None
        except ENDPOINT_GONE as error:
            raise WorkerUnreachable(f"{url} cannot be reached: {type(error).__name__}") from error
        except CONNECTION_LOST as error:
            raise WorkerLost(f"{url} went away: {type(error).__name__}") from error


async def _body(url: str, response: aiohttp.ClientResponse) -> bytes:
    """The whole body of an answer that is not streamed."""
    parts: list[bytes] = []
    size_bytes = 0
    async for part in response.content.iter_any():
        size_bytes += len(part)
        if size_bytes > ANSWER_BYTES_MAX:
            raise WorkerRefused(f"{url} sent more than {ANSWER_BYTES_MAX} bytes")
        parts.append(part)
    return b"".join(parts)


def _decode_state(url: str, decode: Callable[[bytes], State], body: bytes) -> State:
    try:
        return decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkerUnreachable(f"{url} is no worker: {error}") from None


def _checked(url: str, payload: bytes) -> WorkerChunk:
    try:
        chunk = _decode_chunk(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkerRefused(f"{url} sent what is no completion: {error}") from None
    if chunk.error is not None:
        raise _told(url, chunk.error, status=None)
    return chunk


def _refusal(url: str, status: int, body: bytes) -> StrataError:
    """The error a worker answered with."""
    try:
        chunk = _decode_chunk(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        chunk = WorkerChunk()
    return _told(url, chunk.error or WorkerError(), status)


def _told(url: str, error: WorkerError, status: int | None) -> StrataError:
    """The worker's own words, as the error whose handling fits: the client's mistakes go back to the client."""
    if error.code == DeadlineExceeded.code or status == DeadlineExceeded.http_status:
        return DeadlineExceeded(error.message)
    if error.type == InvalidRequest.openai_type or status in (400, 413, 422):
        kind = _INVALID.get(str(error.code), InvalidRequest)
        return kind(error.message, param=error.param)
    if error.code == Overloaded.code or status == Overloaded.http_status:
        return Overloaded(error.message)
    if error.code == HandoverFailed.code:
        return HandoverFailed(f"{url}: {error.message}")
    return WorkerRefused(f"{url}: {error.message}")


def _subclasses(kind: type[InvalidRequest]) -> list[type[InvalidRequest]]:
    return [kind, *(sub for child in kind.__subclasses__() for sub in _subclasses(child))]


_INVALID = {kind.code: kind for kind in _subclasses(InvalidRequest)}
