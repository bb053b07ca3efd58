"""POST /v1/chat/completions and /v1/completions, whole and streamed.

An answer's head is sent with its first token, so that everything that goes wrong before has its own HTTP status.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from dbnode.generate import Answer, Chunk
from dbnode.inference import InferenceService
from dbnode.rest.bodies import DONE, EventWriter, Form, error_event, whole_answer
from dbnode.rest.door import caller_of
from dbnode.rest.http import cancelled_by_disconnect, error_response
from dbnode.rest.parse import Parsed, parse_chat, parse_completion
from stratakv.errors import Cancelled, Overloaded, StrataError
from stratakv.http_body import read_body
from stratakv.log import EventLogger
from stratakv.settings import RestSettings

log = EventLogger("dbnode.rest")

SEND_TIMEOUT_S = 60.0

_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_JSON_HEADERS = [(b"content-type", b"application/json")]
_Parse = Callable[[bytes, str, str], Parsed]


class Completions:
    """Both endpoints; an ASGI application per form is made by `endpoint`."""

    def __init__(self, settings: RestSettings, service: InferenceService) -> None:
        self._settings = settings
        self._service = service
        self._in_progress = 0

    def chat(self) -> Endpoint:
        return Endpoint(self, Form.CHAT, parse_chat)

    def completion(self) -> Endpoint:
        return Endpoint(self, Form.COMPLETION, parse_completion)

    async def serve(self, form: Form, parse: _Parse, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if self._in_progress >= self._settings.requests_max:
            raise Overloaded(f"{self._in_progress} requests are in progress already")
        self._in_progress += 1
        try:
            body = await read_body(Request(scope, receive), self._settings.body_bytes_max)
            parsed = parse(body, form.id_prefix + uuid.uuid4().hex, scope["state"]["trace_id"])
            asked = replace(parsed.request, caller=caller_of(Request(scope)))
            async with (
                cancelled_by_disconnect(receive),
                aclosing(self._service.generate(asked)) as chunks,
            ):
                await (self._stream if parsed.stream else self._whole)(form, parsed, chunks, send)
        except Cancelled as error:
            log.info("client_gone", trace_id=scope["state"]["trace_id"], reason=error.message)
        finally:
            self._in_progress -= 1

    async def _whole(self, form: Form, parsed: Parsed, chunks: AsyncGenerator[Chunk, None], send: Send) -> None:
        answer = Answer()
        async for chunk in chunks:
            answer.add(chunk)
        body = whole_answer(form, parsed.request.request_id, self._service.model, answer)
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*_JSON_HEADERS, length]})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, form: Form, parsed: Parsed, chunks: AsyncGenerator[Chunk, None], send: Send) -> None:
        writer = EventWriter(form, parsed.request.request_id, self._service.model, include_usage=parsed.include_usage)
        started = False
        try:
            async for chunk in chunks:
                events = b"" if started else writer.first()
                events += self._events(writer, parsed, chunk)
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                    started = True
                if events:
                    await _send_part(send, events)
        except Cancelled:
            raise
        except StrataError as error:
            if not started:
                raise
            await _send_part(send, error_event(error.openai_body()))
        await send({"type": "http.response.body", "body": b""})

    def _events(self, writer: EventWriter, parsed: Parsed, chunk: Chunk) -> bytes:
        events = writer.text(chunk.text) if chunk.text else b""
        if chunk.finish_reason is None:
            return events
        events += writer.last(chunk.finish_reason)
        if parsed.include_usage and chunk.usage is not None:
            events += writer.usage(chunk.usage)
        return events + DONE


async def _send_part(send: Send, part: bytes) -> None:
    """Raises Cancelled if the client does not read, since its request holds a place that others wait for."""
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": part, "more_body": True})
    except TimeoutError:
        raise Cancelled(f"the client has read nothing for {SEND_TIMEOUT_S:g} s") from None


class Endpoint:
    """One path as a plain ASGI application: routing calls it without wrapping request or response."""

    def __init__(self, completions: Completions, form: Form, parse: _Parse) -> None:
        self._completions = completions
        self._form = form
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._completions.serve(self._form, self._parse, scope, receive, send)
        except StrataError as error:
            await error_response(error)(scope, receive, send)
