"""Reads a request's body within limits of size and time. Used by the DB node's REST face and by workers."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

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
    """The whole body. Raises BodyTooLarge as soon as it is known to be longer than allowed, BodyTooSlow."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > bytes_max:
        raise BodyTooLarge(f"the request body is longer than {bytes_max} bytes")
    parts: list[bytes] = []
    size_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                size_bytes += len(part)
                if size_bytes > bytes_max:
                    raise BodyTooLarge(f"the request body is longer than {bytes_max} bytes")
                parts.append(part)
    except TimeoutError:
        raise BodyTooSlow(f"the request body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise Cancelled("the client went away before its request was whole") from None
    return b"".join(parts)
