"""The clients of `benchmarks.rest`: as light as can be, they note when each token of an answer arrives."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast

_NAME_MARK = b'"id":"'


@dataclass(slots=True)
class Answer:
    """What a client saw of one answer."""

    asked_s: float
    name: str = ""
    """The worker's name of the request begins with it."""
    received_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Face:
    """Something that answers: the DB node, or the worker alone."""

    name: str
    port: int
    pid: int
    path: str
    token_mark: bytes
    """What each token adds to the answer; several may come in one event."""

    def body(self, text: str, token_ids: list[int], name: str, num_tokens: int, seed: int | None) -> bytes:
        shared: dict[str, Any] = {"max_tokens": num_tokens, "stream": True, "seed": seed}
        if self.name == "alone":
            shared |= {"prompt": token_ids, "request_id": name}
        else:
            shared |= {"messages": [{"role": "user", "content": text}]}
        return json.dumps({key: value for key, value in shared.items() if value is not None}).encode()


class Client(asyncio.Protocol):
    """One stream's connection: a request, its events as they come, the next request."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._mark = b""
        self._answer = Answer(0.0)
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"the connection ended: {self._rest[-300:]!r}"))

    def data_received(self, data: bytes) -> None:
        now_s, answer = time.monotonic(), self._answer
        data = self._rest + data
        cut = data.rfind(b"\n") + 1
        for _ in range(data.count(self._mark, 0, cut)):
            answer.received_s.append(now_s)
        if not answer.name and _NAME_MARK in data:
            answer.name = data.partition(_NAME_MARK)[2].partition(b'"')[0].decode()
        self._rest = data[cut:]
        # the last chunk of the body, after all events
        if data.endswith(b"0\r\n\r\n") and self._done is not None and not self._done.done():
            self._rest = b""
            self._done.set_result(None)

    async def ask(self, face: Face, body: bytes, name: str) -> Answer:
        assert self._transport is not None
        self._mark = face.token_mark
        self._answer, self._done = Answer(time.monotonic(), name), asyncio.get_running_loop().create_future()
        head = f"POST {face.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)
        await self._done
        return self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
