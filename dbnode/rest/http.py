"""The ASGI ground the endpoints stand on: request ids, who is let in, limits, errors in OpenAI's form, disconnects."""

from __future__ import annotations

import asyncio
import math
import re
import uuid
from collections.abc import Awaitable
from types import TracebackType

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dbnode.errors import Unauthenticated
from dbnode.rest.bodies import json_bytes
from dbnode.rest.door import Door
from dbnode.tenants.principal import Principal
from stratakv.errors import Cancelled, StrataError
from stratakv.log import EventLogger

log = EventLogger("dbnode.rest")

RETRY_AFTER_S = 1
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Guard:
    """Outermost layer: gives every request an id, checks the key, and turns whatever goes wrong into an OpenAI error."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        trace_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not _REQUEST_ID.fullmatch(trace_id):
            trace_id = uuid.uuid4().hex
        scope.setdefault("state", {})["trace_id"] = trace_id
        started = False
        principal: Principal | None = None

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal started
            if not started and message["type"] == "http.response.start":
                started = True
                limits = self._door.headers(principal) if principal is not None else ()
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", trace_id.encode()), *limits]
            return send(message)

        try:
            client = scope.get("client")
            principal = scope["state"]["principal"] = self._door.admit(
                scope["path"], headers.get(b"authorization", b""), client[0] if client else None
            )
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            await error_response(error, trace_id)(scope, receive, send_with_id)


def error_response(error: Exception, trace_id: str = "") -> Response:
    """The OpenAI error body of any error; what is not ours is logged and told as an internal error."""
    if isinstance(error, HTTPException):
        body = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
        return _json({"error": body}, error.status_code, dict(error.headers or {}))
    if not isinstance(error, StrataError):
        log.exception("request_failed_unexpectedly", trace_id=trace_id)
        error = StrataError("internal error")
    headers = {}
    if error.http_status in (429, 503):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s or RETRY_AFTER_S))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return _json({"error": error.openai_body()}, error.http_status, headers)


def _json(content: object, status: int, headers: dict[str, str]) -> Response:
    return Response(json_bytes(content), status, headers, media_type="application/json")


class DisconnectWatch:
    """Cancels what runs inside when the client goes away; raises Cancelled then."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._watched = task
        self._watcher = asyncio.create_task(self._watch(), name="disconnect-watcher")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        if self._is_gone and isinstance(error, asyncio.CancelledError):
            self._watched.uncancel()
            raise Cancelled("the client went away") from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self._watched.cancel()
