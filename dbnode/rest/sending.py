"""Sends the parts of a streamed answer to a client that reads them, and gives up one that does not.

A client that does not read holds a place that others wait for. One timer watches the whole answer: a timeout around each part
would cost as much as sending it.
"""

from __future__ import annotations

import asyncio

from starlette.types import Send

from stratakv.errors import Cancelled

SEND_TIMEOUT_S = 60.0


class PartSender:
    """Of one answer, in the task that makes it. Close it at the end."""

    def __init__(self, send: Send, timeout_s: float = SEND_TIMEOUT_S) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._sending_since: float | None = None
        self._is_given_up = False
        self._timer = self._loop.call_later(timeout_s, self._look)

    async def send(self, part: bytes, *, is_last: bool = False) -> None:
        """Raises Cancelled if the client does not read."""
        self._sending_since = self._loop.time()
        try:
            await self._send({"type": "http.response.body", "body": part, "more_body": not is_last})
        except asyncio.CancelledError:
            if not self._is_given_up or self._task is None or self._task.uncancel():
                raise
            raise Cancelled(f"the client has read nothing for {self._timeout_s:g} s") from None
        finally:
            self._sending_since = None

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now_s = self._loop.time()
        since_s = now_s if self._sending_since is None else self._sending_since
        if now_s - since_s >= self._timeout_s and self._task is not None:
            self._is_given_up = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(since_s + self._timeout_s, self._look)
