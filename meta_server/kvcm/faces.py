"""The two transports of a service: gRPC, and HTTP with `POST /api/<camelCaseName>` and the JSON form.

Both ask the doorman about every call, and share the meta server's event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from prometheus_client import CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from meta_server.kvcm.calls import Call, Calls, set_header
from meta_server.kvcm.doorman import SEND, Door, Verdict
from meta_server.kvcm.errors import code_of
from meta_server.kvcm.event_streams import EventStreams
from meta_server.kvcm.json_form import parse, render
from meta_server.kvcm.protocol import event_service_pb2
from stratakv.errors import InvalidRequest, StrataError
from stratakv.http_body import read_body
from stratakv.process import port_taken
from stratakv.tls_files import TlsFiles

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
GRPC_STOP_S = 5.0
API_PREFIX = "/api/"
METRICS_PATH = "/metrics"
EVENTS_PATH = "/events"
EVENT_SERVICE = event_service_pb2.DESCRIPTOR.services_by_name["EventService"].full_name


_GRPC_REFUSALS = {
    Verdict.UNKNOWN: (grpc.StatusCode.UNAUTHENTICATED, SEND),
    Verdict.FORBIDDEN: (grpc.StatusCode.PERMISSION_DENIED, "this needs an administrator"),
    Verdict.LATER: (grpc.StatusCode.UNAVAILABLE, "nobody can be let in just now"),
}
_HTTP_REFUSALS = {
    Verdict.UNKNOWN: (401, f"{SEND}\n"),
    Verdict.FORBIDDEN: (403, "this needs an administrator\n"),
    Verdict.LATER: (503, "nobody can be let in just now\n"),
}


class GrpcFace:
    """One gRPC port."""

    def __init__(self, services: Sequence[Calls], door: Door, streams: EventStreams | None = None) -> None:
        """With `streams` events can be subscribed to here."""
        self._door = door
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
        self._server = grpc.aio.server(options=options)
        for calls in services:
            handlers = {call.name: self._handler(calls, call) for call in calls.by_name.values()}
            if streams is not None and calls.service_name == EVENT_SERVICE:
                handlers["Subscribe"] = self._stream_handler(streams)
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(calls.service_name, handlers),))

    def bind(self, host: str, port: int, setting: str, tls: TlsFiles | None) -> None:
        """Raises SetupError."""
        where = f"[{host}]" if ":" in host else host
        try:
            if tls is None:
                bound = self._server.add_insecure_port(f"{where}:{port}")
            else:
                pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
                bound = self._server.add_secure_port(f"{where}:{port}", grpc.ssl_server_credentials([pair]))
        except RuntimeError:
            bound = 0
        if not bound:
            raise port_taken(host, port, setting)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(GRPC_STOP_S)

    async def _check(self, context: Any) -> None:
        verdict = await self._door.admit(dict(context.invocation_metadata() or ()).get("authorization"))
        if verdict is not Verdict.WELCOME:
            await context.abort(*_GRPC_REFUSALS[verdict])

    def _stream_handler(self, streams: EventStreams) -> Any:
        async def handle(_: Message, context: Any) -> AsyncIterator[Message]:
            await self._check(context)
            try:
                events = streams.subscribe()
            except StrataError as error:
                await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
            async for event in events:
                yield event

        return grpc.unary_stream_rpc_method_handler(
            handle, event_service_pb2.SubscribeRequest.FromString, event_service_pb2.PoolEvent.SerializeToString
        )

    def _handler(self, calls: Calls, call: Call) -> Any:
        async def handle(body: bytes, context: Any) -> Message:
            await self._check(context)
            try:
                request = call.request.FromString(body)
            except DecodeError as error:
                failed: Message = _failed(call, InvalidRequest(f"the request is not valid: {error}"))
                return failed
            response: Message = await calls.run(call, request)
            return response

        # Decoded in the handler, so that a malformed request gets an answer of the API.
        return grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=None, response_serializer=call.response.SerializeToString
        )


class HttpFace:
    """The HTTP form of services, as an ASGI application; metrics in Prometheus' form at /metrics, events at /events.

    No framework: routing and its layers of middleware cost more than most calls.
    """

    def __init__(
        self,
        services: Sequence[Calls],
        door: Door,
        registry: CollectorRegistry,
        streams: EventStreams | None = None,
    ) -> None:
        self._calls = {name: (calls, call) for calls in services for name, call in calls.by_http_name.items()}
        self._door = door
        self._pages = {METRICS_PATH: lambda: _metrics(registry)}
        if streams is not None:
            self._pages[EVENTS_PATH] = lambda: _events(streams)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "the server has neither WebSockets nor a lifespan"
        request = Request(scope, receive)
        response = await self._answer(request)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        method, path = request.method, request.scope["path"]
        page = self._pages.get(path)
        if page is None and not path.startswith(API_PREFIX):
            return PlainTextResponse("there is no such page\n", 404)
        verdict = await self._door.admit(request.headers.get("authorization"))
        if verdict is not Verdict.WELCOME:
            status, text = _HTTP_REFUSALS[verdict]
            return PlainTextResponse(text, status, {"www-authenticate": "Basic"} if status == 401 else None)
        if page is not None:
            return page() if method == "GET" else _not_allowed("GET")
        if method != "POST":
            return _not_allowed("POST")
        found = self._calls.get(path.removeprefix(API_PREFIX))
        return await _run(*found, request) if found is not None else PlainTextResponse("there is no such call\n", 404)


async def _run(calls: Calls, call: Call, request: Request) -> Response:
    try:
        message = parse(await read_body(request, MESSAGE_BYTES_MAX), call.request)
    except StrataError as error:
        response = _failed(call, error)
    else:
        response = await calls.run(call, message)
    return Response(render(response), media_type="application/json")


def _metrics(registry: CollectorRegistry) -> Response:
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")


def _events(streams: EventStreams) -> Response:
    """One event a line, as JSON, until the client goes away."""
    try:
        events = streams.subscribe()
    except StrataError as error:
        return PlainTextResponse(f"{error.message}\n", 503)

    async def lines() -> AsyncIterator[bytes]:
        async for event in events:
            yield render(event) + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _not_allowed(method: str) -> Response:
    return PlainTextResponse(f"only {method} is allowed here\n", 405, {"allow": method})


def _failed(call: Call, error: StrataError) -> Any:
    response = call.response()
    set_header(response, code_of(error), error.message)
    return response
