"""HTTP client of our own workers: completions as they stream, state, cache control. A `dbnode.worker_base.WorkerDoor`.

The form is OpenAI's completions with token ids and `kv_transfer_params`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from dbnode.errors import HandoverFailed, WorkerLost, WorkerRefused, WorkerUnreachable
from dbnode.http_client import Answer
from dbnode.worker_http import EventStream, HttpDoor, decode_state, read_body
from dbnode.worker_messages import (
    EndedRequest,
    EndedRequests,
    UsageOptions,
    WorkerChunk,
    WorkerError,
    WorkerFacts,
    WorkerRequest,
    is_namespace,
)
from stratakv.errors import ContextTooLong, DeadlineExceeded, InvalidRequest, ModelNotFound, Overloaded, StrataError
from stratakv.http_body import BodyTooLarge, BodyTooSlow
from stratakv.pool.auth import PoolCredentials, RequestSigner
from stratakv.wire import WorkerLoad

ENGINE_FAILED = "engine_failed"
"""The process is there still; what computed in it has died."""
_NO_HEADERS: Mapping[str, str] = {}

_encode = msgspec.json.Encoder().encode
_decode_chunk = msgspec.json.Decoder(WorkerChunk).decode
_decode_facts = msgspec.json.Decoder(WorkerFacts).decode
_decode_load = msgspec.json.Decoder(WorkerLoad).decode


class OwnStream(EventStream):
    """A running completion; closing it, at any time, cancels it in the worker."""

    async def chunks(self) -> AsyncGenerator[WorkerChunk, None]:
        """Events until the worker says that it is done. Raises WorkerLost, or the error the worker reports.

        Tokens that came together are one event: who cannot keep up has less to do for each of them.
        """
        while payloads := await self.payloads():
            if len(payloads) == 1:
                yield _checked(self.url, payloads[0])
            else:
                for chunk in _gathered(self.url, payloads):
                    yield chunk


class WorkerClient(HttpDoor):
    """Connections to all of our own workers."""

    def __init__(self, credentials: PoolCredentials | None = None) -> None:
        super().__init__()
        self._signer = RequestSigner(credentials) if credentials is not None else None

    async def stream(self, url: str, request: WorkerRequest, deadline_s: float) -> OwnStream:
        """Start a streamed completion. Raises before the first event what `dbnode.worker_base` says."""
        headers = request.headers
        request = msgspec.structs.replace(
            request, stream=True, stream_options=UsageOptions(), return_token_ids=True, traceparent=None, owner=0
        )
        answer = await self._complete(url, _encode(request), headers)
        return OwnStream(url, answer, deadline_s)

    async def info(self, url: str, timeout_s: float) -> WorkerFacts:
        """Who the worker is. Raises WorkerUnreachable."""
        facts = decode_state(url, _decode_facts, await self._get(url, "/info", timeout_s))
        if not is_namespace(facts.namespace) or facts.block_size < 1:
            raise WorkerUnreachable(f"{url} is no worker: its namespace or block size is wrong")
        return facts

    async def check_ready(self, url: str, timeout_s: float) -> None:
        """Return if the worker takes requests. Raises WorkerUnreachable while it is warming up or cannot be reached."""
        await self._get(url, "/ready", timeout_s)

    async def load(self, url: str, timeout_s: float) -> WorkerLoad:
        """How busy the worker is. Raises WorkerUnreachable."""
        return decode_state(url, _decode_load, await self._get(url, "/load", timeout_s))

    async def ended_requests(self, url: str, request_ids: Sequence[str], timeout_s: float) -> list[EndedRequest]:
        """What the worker has written down of these requests. Raises WorkerUnreachable or what the worker says."""
        body = _encode({"request_ids": list(request_ids)})
        return msgspec.json.decode(await self._post(url, "/requests/ended", body, timeout_s), type=EndedRequests).ended

    async def drop_cache(self, url: str, body: bytes, timeout_s: float) -> dict[str, Any]:
        """Make a worker forget tiers. Raises WorkerUnreachable or what the worker says."""
        return msgspec.json.decode(await self._post(url, "/cache/drop", body, timeout_s), type=dict[str, Any])

    def _no_answer(self, url: str, path: str, status: int) -> str:
        if status == 401:
            return f"{url} does not know this node: give both the same pool.secret"
        return super()._no_answer(url, path, status)

    async def _ask(
        self, method: str, url: str, path: str, body: bytes = b"", headers: Mapping[str, str] = _NO_HEADERS
    ) -> Answer:
        """One request; signed again, once, where a worker that knows the pool's secret has a new challenge."""
        if self._signer is None:
            return await self._http.ask(method, url, path, body, headers)
        for _ in range(2):
            signed = self._signer.sign(url, method, path, body)
            answer = await self._http.ask(method, url, path, body, {**headers, **signed.headers})
            challenge = answer.headers.get(b"www-authenticate", b"").decode("latin-1")
            if answer.status != 401 or not self._signer.learn(url, signed, challenge):
                break
            await read_body(url, answer)
        return answer

    def _refusal(self, url: str, status: int, body: bytes) -> StrataError:
        """The error a worker answered with."""
        try:
            chunk = _decode_chunk(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            chunk = WorkerChunk()
        return told(url, chunk.error or WorkerError(), status)


def _gathered(url: str, payloads: list[bytes]) -> Iterator[WorkerChunk]:
    """The events; those that are side by side and have nothing but tokens as one."""
    gathered: WorkerChunk | None = None
    for payload in payloads:
        try:
            chunk = _checked(url, payload)
        except StrataError:
            if gathered is not None:
                yield gathered
            raise
        if gathered is None:
            gathered = chunk
        elif gathered.has_only_tokens and chunk.has_only_tokens:
            gathered = gathered.with_tokens_of(chunk)
        else:
            yield gathered
            gathered = chunk
    if gathered is not None:
        yield gathered


def _checked(url: str, payload: bytes) -> WorkerChunk:
    try:
        chunk = _decode_chunk(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkerRefused(f"{url} sent what is no completion: {error}") from None
    if chunk.error is not None:
        raise told(url, chunk.error, status=None)
    return chunk


def told(url: str, error: WorkerError, status: int | None) -> StrataError:
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
    if error.code == ENGINE_FAILED:
        return WorkerLost(f"{url}: {error.message}")
    return WorkerRefused(f"{url}: {error.message}")


_INVALID = {kind.code: kind for kind in (InvalidRequest, ContextTooLong, ModelNotFound, BodyTooLarge, BodyTooSlow)}
