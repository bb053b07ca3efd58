"""The worker's HTTP face: completions, state, health, metrics.

Called by DB nodes; anything that speaks OpenAI's completions form may call it too. One request is one `Generation`: the
engine's events come from its thread and are carried into the event loop; a client that goes away cancels its request.
"""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from stratakv.errors import InvalidRequest, ModelNotFound, StrataError
from stratakv.http_body import read_body
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials
from workers.api import CompletionRequest, logprobs_body, owner_of, parse_completion, usage_body
from workers.engine.requests import TokenEvent
from workers.generation import Delta, Finished, Generation
from workers.handover.follow import HANDOVER_WAIT_S, follow
from workers.handover.messages import PATH, Answered, Follow
from workers.membership import BODY_BYTES_MAX, MembersOnly
from workers.runtime import Runtime

log = EventLogger("workers.http")

RETRY_AFTER_S = 1

_json = msgspec.json.Encoder().encode


def create_app(runtime: Runtime, credentials: PoolCredentials | None = None) -> Starlette:
    """The routes over one runtime. With `credentials` only members of the pool are answered (`workers.membership`)."""
    face = _Face(runtime)
    guard = [Middleware(MembersOnly, credentials=credentials)] if credentials is not None else []
    return Starlette(
        middleware=guard,
        routes=[
            Route("/v1/completions", face.completions, methods=["POST"]),
            Route("/v1/models", face.models),
            Route(PATH, face.handovers, methods=["POST"]),
            Route("/info", face.info),
            Route("/load", face.load),
            Route("/health", face.health),
            Route("/ready", face.ready),
            Route("/metrics", face.metrics),
            Route("/cache/drop", face.drop_cache, methods=["POST"]),
            Route("/requests/ended", face.ended_requests, methods=["POST"]),
        ],
        exception_handlers={StrataError: _error_response},
    )


async def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, StrataError)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.http_status in (429, 503) else None
    return JSONResponse({"error": error.openai_body()}, error.http_status, headers=headers)


class _Face:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def completions(self, request: Request) -> Response:
        arrived = time.monotonic()
        body = parse_completion(await read_body(request, BODY_BYTES_MAX))
        if body.model and body.model != self._runtime.info.model:
            raise ModelNotFound(f"this worker serves {self._runtime.info.model}, not {body.model}", param="model")
        body = msgspec.structs.replace(body, owner=owner_of(request.headers))
        request_id = body.request_id or request.headers.get("x-request-id") or uuid.uuid4().hex
        start = functools.partial(self._runtime.start, body, request_id, arrived)
        if body.stream and body.transfer.remote_request_id:
            # What it follows may take long: the stream begins at once, so that a client that goes away is noticed.
            return self._streamed(body, request_id, start)
        generation = await start()
        if body.stream:
            return self._streamed(body, request_id, functools.partial(_started, generation))
        return await self._whole(request, body, request_id, generation)

    def _streamed(
        self, body: CompletionRequest, request_id: str, start: Callable[[], Awaitable[Generation]]
    ) -> StreamingResponse:
        stream = _Stream(body, request_id, start, self._runtime)
        return StreamingResponse(stream.chunks(), media_type="text/event-stream")

    async def _whole(
        self, request: Request, body: CompletionRequest, request_id: str, generation: Generation
    ) -> Response:
        text: list[str] = []
        token_ids: list[int] = []
        scored: list[TokenEvent] = []
        finished: Finished | None = None
        watcher = asyncio.create_task(_cancel_on_disconnect(request, generation), name=f"disconnect-{request_id}")
        try:
            async for event in generation.events():
                if isinstance(event, Delta):
                    text.append(event.text)
                    token_ids.extend(event.token_ids)
                    scored.extend(event.scored)
                else:
                    finished = event
        finally:
            watcher.cancel()
            generation.cancel()
        assert finished is not None
        choice = {
            "index": 0,
            "text": "".join(text),
            "token_ids": token_ids,
            "finish_reason": finished.reason,
            "logprobs": logprobs_body(scored) if body.logprobs is not None else None,
        }
        handover = await _handover(body, generation, self._runtime)
        return JSONResponse(
            {
                "id": request_id,
                "object": "text_completion",
                "created": int(time.time()),
                "model": self._runtime.info.model,
                "choices": [choice],
                "usage": usage_body(finished.usage),
                "kv_transfer_params": handover,
            }
        )

    async def handovers(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await read_body(request, BODY_BYTES_MAX), type=Follow)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f'expected {{"request_id": …}}: {error}') from None
        handover = await self._runtime.handovers.follow(wanted.request_id)
        return StreamingResponse(follow(self._runtime, handover), media_type="application/octet-stream")

    async def models(self, request: Request) -> Response:
        info = self._runtime.info
        card = {"id": info.model, "object": "model", "owned_by": "stratakv", "max_model_len": info.max_model_len}
        return JSONResponse({"object": "list", "data": [card]})

    async def info(self, request: Request) -> Response:
        info = self._runtime.info
        facts = msgspec.to_builtins(info) | {"epoch": info.epoch.hex(), "namespace": info.namespace.hex()}
        more = {
            "hands_over": self._runtime.hands_over,
            "max_running": self._runtime.max_running,
            "profile": msgspec.to_builtins(self._runtime.profile),
        }
        return JSONResponse(facts | {"dtype": self._runtime.dtype} | more)

    async def load(self, request: Request) -> Response:
        return Response(_json(self._runtime.load()), media_type="application/json")

    async def health(self, request: Request) -> Response:
        healthy = self._runtime.healthy
        return JSONResponse({"status": "alive" if healthy else "engine stopped"}, 200 if healthy else 503)

    async def ready(self, request: Request) -> Response:
        reasons = self._runtime.not_ready_reasons()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._runtime.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def drop_cache(self, request: Request) -> Response:
        try:
            tiers = msgspec.json.decode(
                await read_body(request, BODY_BYTES_MAX) or b'{"tiers":["l1","l2"]}', type=dict[str, list[str]]
            )
        except msgspec.DecodeError as error:
            raise InvalidRequest(f'expected {{"tiers": ["l1", "l2"]}}: {error}') from None
        unknown = set(tiers.get("tiers", [])) - {"l1", "l2"}
        if unknown or set(tiers) != {"tiers"}:
            raise InvalidRequest(
                f'tiers: expected {{"tiers": ["l1", "l2"]}}, got {sorted(unknown or tiers)}', param="tiers"
            )
        return JSONResponse(await self._runtime.drop_cache(frozenset(tiers["tiers"])))

    async def ended_requests(self, request: Request) -> Response:
        """What was written down of requests that have ended."""
        try:
            asked = msgspec.json.decode(await read_body(request, BODY_BYTES_MAX), type=dict[str, list[str]])
            request_ids = asked["request_ids"]
        except (msgspec.DecodeError, KeyError):
            raise InvalidRequest('expected {"request_ids": [...]}', param="request_ids") from None
        journal = self._runtime.journal
        found = [] if journal is None else await asyncio.to_thread(journal.find, request_ids)
        return JSONResponse({"ended": found})


class _Stream:
    """One streamed answer as server-sent events; `start` makes the generation when the stream begins."""

    def __init__(
        self, body: CompletionRequest, request_id: str, start: Callable[[], Awaitable[Generation]], runtime: Runtime
    ) -> None:
        self._body = body
        self._start = start
        self._runtime = runtime
        self._head = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": runtime.info.model,
        }

    def _chunk(self, **fields: Any) -> bytes:
        return b"data: " + _json(self._head | fields) + b"\n\n"

    async def chunks(self) -> AsyncIterator[bytes]:
        generation: Generation | None = None
        try:
            generation = await self._start()
            async for event in generation.events():
                if isinstance(event, Delta):
                    choice = {"index": 0, "text": event.text, "token_ids": event.token_ids, "finish_reason": None}
                    if event.scored:
                        choice["logprobs"] = logprobs_body(event.scored)
                    yield self._chunk(choices=[choice])
                    continue
                for chunk in await self._end(generation, event):
                    yield chunk
        except StrataError as error:
            yield b"data: " + _json({"error": error.openai_body()}) + b"\n\n"
        finally:
            if generation is not None:
                generation.cancel()
                self._runtime.request_over(generation)

    async def _end(self, generation: Generation, finished: Finished) -> list[bytes]:
        handover = None
        if generation.followed is None:
            handover = await _handover(self._body, generation, self._runtime)
        else:
            generation.followed.tell(Answered(generation.token_ids, finished.reason))
        choice = {"index": 0, "text": "", "token_ids": [], "finish_reason": finished.reason}
        chunks = [self._chunk(choices=[choice], **({"kv_transfer_params": handover} if handover else {}))]
        if self._body.stream_options and self._body.stream_options.include_usage:
            chunks.append(self._chunk(choices=[], usage=usage_body(finished.usage)))
        return [*chunks, b"data: [DONE]\n\n"]


async def _started(generation: Generation) -> Generation:
    return generation


async def _handover(body: CompletionRequest, generation: Generation, runtime: Runtime) -> dict[str, Any] | None:
    """For a prefill worker: what the decode worker must be told, once the prompt's blocks can be found."""
    if not body.transfer.do_remote_decode:
        return None
    return {
        "do_remote_prefill": (await runtime.wait_saved(generation.prompt_keys, HANDOVER_WAIT_S)).is_whole,
        "num_tokens": len(generation.prompt_keys) * runtime.info.block_size,
    }


async def _cancel_on_disconnect(request: Request, generation: Generation) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    generation.cancel()
