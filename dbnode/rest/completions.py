"""POST /v1/chat/completions and /v1/completions, whole and streamed.

An answer's head is sent with its first token, so that everything that goes wrong before has its own HTTP status.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.types import Receive, Scope, Send

from dbnode.generate import Chunk, Source, Usage
from dbnode.inference import InferenceService
from dbnode.rest.answer_format import AnswerEvents, AnswerFormat, WholeAnswer
from dbnode.rest.bodies import DONE, EventWriter, error_event, metrics_object, total, usage_object, whole
from dbnode.rest.choices import Generate, answers
from dbnode.rest.door import caller_in
from dbnode.rest.form import Form
from dbnode.rest.http import DisconnectWatch, error_response
from dbnode.rest.parse import Asked, Parsed, parse_chat, parse_completion
from dbnode.rest.sending import PartSender
from stratakv.errors import Cancelled, Overloaded, StrataError
from stratakv.http_body import receive_body
from stratakv.log import EventLogger
from stratakv.settings import RestSettings

log = EventLogger("dbnode.rest")

_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_JSON_HEADERS = [(b"content-type", b"application/json")]
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_Parse = Callable[[bytes, Asked], Parsed]
_Chunks = AsyncGenerator[Chunk, None]


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

    async def serve(
        self,
        form: Form,
        parse: _Parse,
        scope: Scope,
        receive: Receive,
        send: Send,
        generate: Generate | None = None,
    ) -> None:
        """Answer one request; another way of generating than the service's may be given."""
        tenant = caller_in(scope).tenant
        is_full = self._in_progress >= self._settings.requests_max
        if is_full and not self._service.admission.make_room(Source.REST, tenant):
            raise Overloaded(f"{self._in_progress} requests are in progress already")
        self._in_progress += 1
        try:
            body = await receive_body(scope, receive, self._settings.body_bytes_max)
            parsed = parse(body, _asked(form, scope))
            async with (
                DisconnectWatch(receive),
                aclosing(answers(generate or self._service.generate, parsed)) as chunks,
            ):
                await (self._stream if parsed.stream else self._whole)(form, parsed, chunks, send)
        except Cancelled as error:
            log.info("client_gone", trace_id=scope["state"]["trace_id"], reason=error.message)
        finally:
            self._in_progress -= 1

    async def _whole(self, form: Form, parsed: Parsed, chunks: _Chunks, send: Send) -> None:
        answer = self._format(form, parsed)
        choices = [WholeAnswer(answer, index, echo) for index, echo in enumerate(await self._echoes(parsed))]
        usages: list[Usage] = []
        async for chunk in chunks:
            choices[chunk.index].add(chunk)
            if chunk.usage is not None:
                usages.append(chunk.usage)
        more = _more(parsed, usages, with_usage=True)
        made = [choice.choice() for choice in choices]
        body = whole(form, parsed.request.request_id, self._service.model, made, more)
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*_JSON_HEADERS, length]})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, form: Form, parsed: Parsed, chunks: _Chunks, send: Send) -> None:
        writers = self._writers(form, parsed)
        answer = self._format(form, parsed)
        echoes = await self._echoes(parsed)
        streams = [AnswerEvents(answer, writer, echo) for writer, echo in zip(writers, echoes, strict=True)]
        usages: list[Usage] = []
        parts = PartSender(send)
        started, end = False, b""
        try:
            async for chunk in chunks:
                events = streams[chunk.index].events(chunk)
                if chunk.usage is not None:
                    usages.append(chunk.usage)
                    if len(usages) == len(streams):
                        more = _more(parsed, usages, with_usage=parsed.include_usage)
                        events, end = b"", events + (writers[0].end(more) if more else b"") + DONE
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                    started = True
                if events:
                    await parts.send(events)
            await parts.send(end, is_last=True)
        except Cancelled:
            raise
        except StrataError as error:
            if not started:
                raise
            await parts.send(end + error_event(error.openai_body()), is_last=True)
        finally:
            parts.close()

    def _writers(self, form: Form, parsed: Parsed) -> list[EventWriter]:
        request_id, model, include_usage = parsed.request.request_id, self._service.model, parsed.include_usage
        return [
            EventWriter(form, request_id, model, include_usage=include_usage, index=index)
            for index in range(parsed.num_choices)
        ]

    async def _echoes(self, parsed: Parsed) -> list[str]:
        """What each answer begins with."""
        if not parsed.echo:
            return [""] * parsed.num_choices
        texts = [await self._service.tokens.prompt_text(request) for request in parsed.prompts]
        return [text for text in texts for _ in range(parsed.num_answers)]

    def _format(self, form: Form, parsed: Parsed) -> AnswerFormat:
        num_top = parsed.request.sampling.logprobs
        return AnswerFormat(form, parsed.tools, num_top, None if num_top is None else self._service.tokens.texts)


def _asked(form: Form, scope: Scope) -> Asked:
    """What the headers say. A trace context that is none is ignored, as its specification wants."""
    traceparent, wants_timing = None, False
    for name, value in scope["headers"]:
        if name == b"x-stratakv-timing":
            wants_timing = value not in (b"", b"0", b"false")
        elif name == b"traceparent" and _TRACEPARENT.fullmatch(value):
            traceparent = value.decode()
    return Asked(
        form.id_prefix + uuid.uuid4().hex,
        scope["state"]["trace_id"],
        caller_in(scope),
        traceparent,
        wants_timing,
    )


def _more(parsed: Parsed, usages: list[Usage], *, with_usage: bool) -> dict[str, Any]:
    """What stands beside the choices."""
    used = total(usages)
    more = {"usage": usage_object(used)} if with_usage else {}
    return more | ({"metrics": metrics_object(used, len(usages))} if parsed.wants_timing else {})


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
