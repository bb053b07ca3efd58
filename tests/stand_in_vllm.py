"""The wire format of a vLLM 0.32 OpenAI server, without a model: what it answers was recorded from a real one.

The real thing is tested by `make test-vllm`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from stratakv.keys import block_keys, salt_extra
from tests.stand_in_worker import MODEL, token_at

BLOCK_SIZE = 32
MAX_MODEL_LEN = 4096
EOS = 2

METRICS = """\
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds {started}
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="m"}} {waiting}
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {usage}
vllm:request_prompt_tokens_count{{engine="0",model_name="m"}} 10.0
vllm:request_prompt_tokens_sum{{engine="0",model_name="m"}} 3000.0
vllm:request_prefill_kv_computed_tokens_sum{{engine="0",model_name="m"}} 901.0
vllm:request_prefill_time_seconds_sum{{engine="0",model_name="m"}} 1.7364839839938213
vllm:inter_token_latency_seconds_count{{engine="0",model_name="m"}} 54.0
vllm:inter_token_latency_seconds_sum{{engine="0",model_name="m"}} 2.659498879995226
vllm:cache_config_info{{_block_size_resolved="True",block_size="{block_size}",cache_dtype="auto",\
enable_prefix_caching="True",engine="0",num_cpu_blocks="None",num_gpu_blocks="182",\
prefix_caching_hash_algo="{algorithm}"}} 1.0
"""


@dataclass
class StandInVllm:
    """One stand-in; its fields are what tests set and look at."""

    served: str = MODEL
    tokenize: Callable[[str], list[int]] | None = None
    """None: the endpoint is not there."""
    algorithm: str = "sha256_cbor"
    started: float = 1.79536859559e09
    running: int = 0
    waiting: int = 0
    usage: float = 0.0
    eos_after: int | None = None
    """Tokens after which it ends by itself."""
    lose_after_tokens: int | None = None
    engine_is_dead: bool = False
    stream_error: dict[str, Any] | None = None
    """Said instead of any token, in a stream whose status is 200."""
    refuse: tuple[int, dict[str, Any]] | None = None
    namespace: str = ""
    """What its connector says; empty: it has none."""
    token_delay_s: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    cancelled: int = 0
    cached: set[bytes] = field(default_factory=set)
    port: int = 0
    _runner: web.AppRunner | None = None

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"vllm://{self.place}"

    async def start(self, port: int = 0) -> StandInVllm:
        app = web.Application(client_max_size=16 * 1024 * 1024)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        if self.tokenize is not None:
            app.router.add_post("/tokenize", self._tokenize)
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

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.engine_is_dead else 200)

    async def _metrics(self, request: web.Request) -> web.Response:
        known = {
            "algorithm": self.algorithm,
            "started": self.started,
            "running": self.running,
            "waiting": self.waiting,
            "usage": self.usage,
        }
        return web.Response(text=METRICS.format(block_size=BLOCK_SIZE, **known))

    async def _models(self, request: web.Request) -> web.Response:
        card = {"id": self.served, "object": "model", "owned_by": "vllm", "root": "/models/m", "parent": None}
        return web.json_response({"object": "list", "data": [card | {"max_model_len": MAX_MODEL_LEN}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        assert self.tokenize is not None
        tokens = self.tokenize((await request.json())["prompt"])
        return web.json_response({"count": len(tokens), "max_model_len": MAX_MODEL_LEN, "tokens": tokens})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            said = {"stratakv": {"namespace": self.namespace}} if self.namespace else None
            return web.json_response({"choices": [], "kv_transfer_params": said})
        self.requests.append(body)
        self.authorizations.append(request.headers.get("Authorization"))
        if self.refuse is not None:
            return web.json_response({"error": self.refuse[1]}, status=self.refuse[0])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            return await self._stream(request, response, body)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, body: dict[str, Any]
    ) -> web.StreamResponse:
        prompt = body["prompt"]
        if self.stream_error is not None:
            await response.write(b"data: " + json.dumps({"error": self.stream_error}).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
            return response
        num_tokens = body["max_tokens"] if self.eos_after is None else min(body["max_tokens"], self.eos_after + 1)
        for index in range(num_tokens):
            if self.lose_after_tokens == index:
                assert request.transport is not None
                request.transport.abort()
                return response
            if self.token_delay_s:
                await asyncio.sleep(self.token_delay_s)
            is_eos = self.eos_after == index
            reason = "stop" if is_eos else "length" if index + 1 == num_tokens else None
            await response.write(_event([_choice(body, index, EOS if is_eos else token_at(prompt, index), reason)]))
        usage = {
            "prompt_tokens": len(prompt),
            "total_tokens": len(prompt) + num_tokens,
            "completion_tokens": num_tokens,
        }
        cached = self._cached(body)
        await response.write(_event([], usage=usage | {"prompt_tokens_details": {"cached_tokens": cached}}))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _cached(self, body: dict[str, Any]) -> int:
        keys = block_keys(body["prompt"], BLOCK_SIZE, first_block_extra=salt_extra(body.get("cache_salt")))
        num_held = next((i for i, key in enumerate(keys) if key not in self.cached), len(keys))
        self.cached.update(keys)
        return min(num_held * BLOCK_SIZE, len(body["prompt"]) - 1)


def _choice(body: dict[str, Any], index: int, token: int, reason: str | None) -> dict[str, Any]:
    return {
        "index": 0,
        "text": "x",
        "logprobs": None,
        "finish_reason": reason,
        "stop_reason": None,
        "prompt_token_ids": body["prompt"] if index == 0 else None,
        "token_ids": [token],
    }


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    head = {"id": "cmpl-x", "object": "text_completion", "created": 1795368629, "model": MODEL, "choices": choices}
    return b"data: " + json.dumps(head | more, separators=(",", ":")).encode() + b"\n\n"
