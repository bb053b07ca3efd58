"""A worker's HTTP face without a model, as light as can be, that remembers when it sent each token. For `benchmarks.rest`.

`python -m benchmarks.rest_worker TOKEN_ID MODEL` prints its port. A request's first token comes at once; the others at the beats of
one clock for all of them, as from a batch, or at once if the request's `seed` is 0. GET /sent tells the times of what was sent, by
request, and forgets them.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any, cast

import httptools
import msgspec
import uvloop

STEP_S = 0.025
MAX_MODEL_LEN = 8192
NO_BEAT_SEED = 0

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Answering:
    """One request while it is answered."""

    def __init__(self, connection: Connection, body: dict[str, Any]) -> None:
        self.connection = connection
        self.name = str(body.get("request_id", ""))
        self.num_prompt = len(body["prompt"])
        self.num_left = int(body["max_tokens"])
        self.sent_s: list[float] = []

    def send_token(self) -> None:
        self.num_left -= 1
        parts = [self.connection.shared.token_event]
        if not self.num_left:
            parts += [_event({"choices": [{"index": 0, "text": "", "token_ids": [], "finish_reason": "length"}]})]
            parts += [_event({"choices": [], "usage": self._usage()}), b"data: [DONE]\n\n"]
        data = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        self.sent_s.append(time.monotonic())
        self.connection.write(data if self.num_left else data + b"0\r\n\r\n")

    def _usage(self) -> dict[str, Any]:
        tiers = {"computed": self.num_prompt, "l1": 0, "l2": 0, "pool": 0, "disk": 0}
        counts = {"prompt_tokens": self.num_prompt, "completion_tokens": len(self.sent_s) + 1}
        return counts | {"stratakv": tiers | {"queue_ms": 0.0, "prefill_ms": 0.0, "decode_ms": 0.0}}


class Shared:
    """What all connections have in common."""

    def __init__(self, token_id: int, model: str) -> None:
        self.model = model
        self.port = 0
        self.running: set[Answering] = set()
        self.sent: dict[str, list[float]] = {}
        self.token_event = _event(
            {"choices": [{"index": 0, "text": "", "token_ids": [token_id], "finish_reason": None}]}
        )

    def answer(self, connection: Connection, body: dict[str, Any]) -> None:
        answering = Answering(connection, body)
        connection.write(_HEAD)
        answering.send_token()
        if body.get("seed") == NO_BEAT_SEED:
            while answering.num_left:
                answering.send_token()
        elif answering.num_left:
            self.running.add(answering)
            return
        self._ended(answering)

    async def beat(self) -> None:
        """A token to each, again and again."""
        at_s = time.monotonic()
        while True:
            at_s = max(at_s + STEP_S, time.monotonic())
            await asyncio.sleep(at_s - time.monotonic())
            for answering in list(self.running):
                answering.send_token()
                if not answering.num_left:
                    self.running.discard(answering)
                    self._ended(answering)

    def state(self, path: bytes) -> Any:
        if path == b"/info":
            facts = {"worker": "bench", "epoch": "00" * 16, "role": "both", "model": self.model, "dtype": "bf16"}
            sizes = {"block_size": 16, "max_model_len": MAX_MODEL_LEN, "namespace": "00" * 16, "node": None}
            return facts | sizes | {"url": f"http://127.0.0.1:{self.port}", "hands_over": False}
        if path == b"/sent":
            sent, self.sent = self.sent, {}
            return sent
        return {"ready": True} if path == b"/ready" else {"prefill_tokens_per_s": 1e6, "decode_step_s": STEP_S}

    def _ended(self, answering: Answering) -> None:
        self.sent[answering.name] = answering.sent_s


class Connection(asyncio.Protocol):
    """One client's connection; its requests come one after another."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._path = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.shared.running = {a for a in self.shared.running if a.connection is not self}

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path, self._body = url, []

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._path == b"/v1/completions":
            self.shared.answer(self, _decode(b"".join(self._body)))
            return
        body = _encode(self.shared.state(self._path))
        self.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def _event(chunk: dict[str, Any]) -> bytes:
    head = {"id": "cmpl", "object": "text_completion", "created": 0, "model": "bench"}
    return b"data: " + _encode(head | chunk) + b"\n\n"


async def main(token_id: int, model: str) -> None:
    shared = Shared(token_id, model)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(shared), "127.0.0.1", 0)
    shared.port = server.sockets[0].getsockname()[1]
    print(shared.port, flush=True)
    await shared.beat()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
