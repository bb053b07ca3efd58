"""A worker's HTTP face without a model: deterministic tokens, a cache that is only a set of keys, faults on demand.

The DB node's tests run it in their own process, or as one of its own where it must be killed:
`python -m tests.stand_in_worker PORT NAME ROLE [TOKEN_DELAY_S [POISON_TOKEN]]`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from stratakv.keys import block_keys, salt_extra
from stratakv.tenancy.values import OWNER_HEADER

MODEL = "smollm2-135m"
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
POISON_WORKS_S = 0.2
"""Others are let into the batch meanwhile."""


def token_at(prompt: list[int], index: int) -> int:
    """The token any stand-in generates at this place."""
    return 1000 + (sum(prompt) * 31 + index * 7919) % 20_000


def logprob_at(index: int) -> float:
    """What any stand-in tells of the token at this place."""
    return -0.5 - index


def expected_tokens(prompt: list[int], num_tokens: int) -> list[int]:
    return [token_at(prompt, i) for i in range(num_tokens)]


@dataclass
class StandInWorker:
    """One stand-in; its fields are what tests set and look at."""

    name: str
    role: str = "both"
    token_delay_s: float = 0.0
    lose_after_tokens: int | None = None
    """Break the connection when so many tokens of a request have been sent."""
    poison_token: int | None = None
    """Kill the process, after a while, on prompts that begin with it."""
    lose_prefills: bool = False
    refuse_status: int | None = None
    pool_writes_fail: bool = False
    finish_reason: str = "length"
    """What it says at the end, having generated max_tokens in any case."""
    warming_up: bool = False
    hang: bool = False
    """Accept requests and say nothing."""
    hands_over: bool = False
    handover_fails: bool = False
    """Say so of prompts that it is to take over."""
    max_running: int = 0
    """Sequences it says that it decodes at once; 0: it does not tell."""
    prefill_delay_s: float = 0.0
    """Before the first token of a prompt that is handed over."""
    epoch: bytes = field(default_factory=lambda: os.urandom(16))
    load: dict[str, Any] = field(default_factory=lambda: {"prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01})
    requests: list[dict[str, Any]] = field(default_factory=list)
    cancelled: int = 0
    journal: list[dict[str, Any]] = field(default_factory=list)
    """What it has written down of requests."""
    traceparents: list[str | None] = field(default_factory=list)
    owners: list[str | None] = field(default_factory=list)
    """Of the requests."""
    l1: set[bytes] = field(default_factory=set)
    answer: list[int] | None = None
    """Tokens to answer everything with, to the end, in the place of made-up ones."""
    port: int = 0
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> StandInWorker:
        app = web.Application(client_max_size=16 * 1024 * 1024)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/cache/drop", self._drop)
        app.router.add_post("/requests/ended", self._ended)
        app.router.add_get("/info", self._info)
        app.router.add_get("/load", self._load)
        app.router.add_get("/ready", self._ready)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _info(self, request: web.Request) -> web.Response:
        facts = {"worker": self.name, "epoch": self.epoch.hex(), "role": self.role, "model": MODEL, "url": self.url}
        sizes = {"block_size": BLOCK_SIZE, "max_model_len": MAX_MODEL_LEN}
        more = {"namespace": "00" * 16, "node": None, "dtype": "bf16", "hands_over": self.hands_over}
        more["max_running"] = self.max_running
        return web.json_response(facts | sizes | more)

    async def _load(self, request: web.Request) -> web.Response:
        return web.json_response(self.load)

    async def _ready(self, request: web.Request) -> web.Response:
        return web.json_response({"ready": not self.warming_up}, status=503 if self.warming_up else 200)

    async def _drop(self, request: web.Request) -> web.Response:
        num_blocks = len(self.l1)
        self.l1.clear()
        return web.json_response({"l1_blocks": num_blocks, "l2_blocks": 0})

    async def _ended(self, request: web.Request) -> web.Response:
        asked = (await request.json())["request_ids"]
        return web.json_response(
            {"ended": [one for one in self.journal if one["request_id"].rpartition("-")[0] in asked]}
        )

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.traceparents.append(request.headers.get("traceparent"))
        self.owners.append(request.headers.get(OWNER_HEADER))
        if self.answer is not None:
            body["max_tokens"] = min(body["max_tokens"], len(self.answer))
        if self.refuse_status is not None:
            error = {"message": "refused", "type": "server_error", "param": None, "code": "overloaded"}
            return web.json_response({"error": error}, status=self.refuse_status)
        if body["prompt"][0] == self.poison_token:
            await asyncio.sleep(POISON_WORKS_S)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.hang:
            await asyncio.sleep(3600)
        transfer = body.get("kv_transfer_params") or {}
        if transfer.get("do_remote_decode"):
            return await self._prefill(request, body)
        taken_over = [token_at(body["prompt"], 0)] if transfer.get("remote_request_id") else []
        try:
            return await self._stream(request, body, taken_over or transfer.get("output_token_ids", []))
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise

    def _usage(self, body: dict[str, Any], num_generated: int, pool_tokens: int) -> dict[str, Any]:
        prompt = body["prompt"]
        keys = block_keys(prompt, BLOCK_SIZE, first_block_extra=salt_extra(body.get("cache_salt")))
        num_held = next((i for i, key in enumerate(keys) if key not in self.l1), len(keys))
        self.l1.update(keys)
        l1 = min(num_held * BLOCK_SIZE, len(prompt) - 1)
        pool = max(0, min(pool_tokens, len(prompt) - 1) - l1)
        tiers = {"computed": len(prompt) - l1 - pool, "l1": l1, "l2": 0, "pool": pool, "disk": 0}
        return {
            "prompt_tokens": len(prompt),
            "completion_tokens": num_generated,
            "total_tokens": len(prompt) + num_generated,
            "prompt_tokens_details": {"cached_tokens": l1 + pool},
            "stratakv": tiers | {"queue_ms": 0.5, "prefill_ms": 1.0, "decode_ms": 1.0},
        }

    async def _prefill(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.lose_prefills:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        prompt = body["prompt"]
        handover = {
            "do_remote_prefill": not self.pool_writes_fail,
            "num_tokens": len(prompt) // BLOCK_SIZE * BLOCK_SIZE,
        }
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(self.prefill_delay_s)
        await response.write(_event({"choices": [self._choice(body, 0)]}))
        end = {"index": 0, "text": "", "token_ids": [], "finish_reason": "length"}
        await response.write(_event({"choices": [end], "kv_transfer_params": handover}))
        await response.write(_event({"choices": [], "usage": self._usage(body, 1, 0)}))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _choice(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        """One token; its log-probability, if wanted, tells its index, and the likeliest ones are those that follow it."""
        token = token_at(body["prompt"], index) if self.answer is None else self.answer[index]
        choice = {"index": 0, "text": "", "token_ids": [token], "finish_reason": None}
        if body.get("logprobs") is None:
            return choice
        top = {f"token_id:{token + rank}": logprob_at(index) - rank for rank in range(body["logprobs"])}
        told = {"tokens": [f"token_id:{token}"], "token_logprobs": [logprob_at(index)], "top_logprobs": [top]}
        return choice | {"logprobs": told}

    async def _stream(self, request: web.Request, body: dict[str, Any], resumed: list[int]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.handover_fails and (body.get("kv_transfer_params") or {}).get("remote_request_id"):
            error = {"message": "not here", "type": "server_error", "param": None, "code": "handover_failed"}
            await response.write(_event({"error": error}))
            return response
        for number, index in enumerate(range(len(resumed), body["max_tokens"])):
            if self.lose_after_tokens == number:
                assert request.transport is not None
                request.transport.abort()
                return response
            if self.token_delay_s:
                await asyncio.sleep(self.token_delay_s)
            await response.write(_event({"choices": [self._choice(body, index)]}))
        await response.write(
            _event({"choices": [{"index": 0, "text": "", "token_ids": [], "finish_reason": self.finish_reason}]})
        )
        pool_tokens = (body.get("kv_transfer_params") or {}).get("num_tokens", 0)
        usage = self._usage(body, body["max_tokens"], pool_tokens)
        await response.write(_event({"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response


def _event(chunk: dict[str, Any]) -> bytes:
    head = {"id": "cmpl", "object": "text_completion", "created": 0, "model": MODEL}
    return b"data: " + msgspec.json.encode(head | chunk) + b"\n\n"


async def main(port: int, name: str, role: str, token_delay_s: float = 0.0, poison_token: float = -1) -> None:
    await StandInWorker(name, role, token_delay_s, poison_token=int(poison_token)).start(port)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3], *map(float, sys.argv[4:6])))
