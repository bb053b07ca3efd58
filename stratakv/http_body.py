"""Reads a request's body within limits of size and time. Used by the DB node's REST face and by workers."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.types import Receive, Scope

from stratakv.errors import Cancelled, InvalidRequest

BODY_TIMEOUT_S = 60.0


class BodyTooLarge(InvalidRequest):
    """The request body is over the limit."""

    code = "body_too_large"
    http_status = 413
    sqlstate = "54000"


class BodyTooSlow(InvalidRequest):
    """The request body did not arrive in time."""

    code = "body_too_slow"
    http_status = 408


async def read_body(request: Request, bytes_max: int) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it is known to be longer than allowed, BodyTooSlow, Cancelled."""
    return await receive_body(request.scope, request.receive, bytes_max)


async def receive_body(scope: Scope, receive: Receive, bytes_max: int) -> bytes:
    """The same of a request that is not wrapped."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > bytes_max:
            raise BodyTooLarge(f"the request body is longer than {bytes_max} bytes")
    parts: list[bytes] = []
    size_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            is_whole = False
            while not is_whole:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Cancelled("the client went away before its request was whole")
                part = message.get("body", b"")
                size_bytes += len(part)
                if size_bytes > bytes_max:
                    raise BodyTooLarge(f"the request body is longer than {bytes_max} bytes")
                parts.append(part)
                is_whole = not message.get("more_body", False)
    except TimeoutError:
        raise BodyTooSlow(f"the request body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    return b"".join(parts)
