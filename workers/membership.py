"""Lets only members of the pool ask a worker for anything: each request must carry a proof (`stratakv.pool.auth`).

Without its challenge a client cannot make one: the refusal (401) tells it.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stratakv.errors import StrataError
from stratakv.http_body import read_body
from stratakv.pool.auth import PoolCredentials, RequestChecker

BODY_BYTES_MAX = 16 * 1024 * 1024
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""What load balancers and monitoring ask for; it tells nothing of any request."""


class MembersOnly:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, credentials: PoolCredentials) -> None:
        self._app = app
        self._checker = RequestChecker(credentials)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        challenge = self._checker.challenge_header
        try:
            body = await read_body(request, BODY_BYTES_MAX)
            self._checker.check(request.headers.get("authorization"), request.method, request.url.path, body)
        except StrataError as error:
            headers = {"WWW-Authenticate": challenge} if error.http_status == 401 else None
            await JSONResponse({"error": error.openai_body()}, error.http_status, headers)(scope, receive, send)
            return
        await self._app(scope, _with_body(body, receive), send)


def _with_body(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then what comes after it."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
