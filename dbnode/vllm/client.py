"""HTTP client of vLLM's OpenAI servers, as workers of the DB node. A `dbnode.worker_base.WorkerDoor`.

A server is registered when it first answers, and again when another process does: which model, which context and block size,
and whether it makes the same tokens of a text as this node. Where it is asked to compute a prompt for another worker, it is told
nothing of that: its connector writes every block to the pool, and the hand-over is reported when they can be found there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from dbnode.errors import WorkerRefused, WorkerUnreachable
from dbnode.http_client import Answer
from dbnode.scheduler.pool_view import PoolView
from dbnode.vllm.metrics import read_metrics
from dbnode.vllm.server import VllmServer
from dbnode.vllm.wire import Introduced, ModelList, Part, Reader, Tokens, body, introduction, refusal
from dbnode.worker_http import EventStream, HttpDoor, decode_state
from dbnode.worker_messages import EndedRequest, KVTransfer, WorkerChunk, WorkerFacts, WorkerRequest, is_namespace
from stratakv.errors import StrataError
from stratakv.keys import block_keys, salt_extra
from stratakv.log import EventLogger
from stratakv.wire import WorkerLoad
from stratakv.worker_address import VllmAddress

log = EventLogger("dbnode.vllm")

HAND_OVER_S_MAX = 10.0
"""Blocks that are not in the pool so long after the first token are not waited for."""
HAND_OVER_POLL_S = 0.01
INTRODUCTION_TIMEOUT_S = 10.0
"""A busy server's token may take longer than its other answers."""
_NO_HEADERS: Mapping[str, str] = {}

_encode = msgspec.json.Encoder().encode
_decode_models = msgspec.json.Decoder(ModelList).decode
_decode_introduced = msgspec.json.Decoder(Introduced).decode
_decode_tokens = msgspec.json.Decoder(Tokens).decode


@dataclass(frozen=True, slots=True)
class GoldenText:
    """A text and this node's tokens of it: a server that makes others of it serves another model."""

    text: str
    token_ids: list[int]


class VllmStream(EventStream):
    """A running completion; closing it, at any time, makes vLLM abort it."""

    def __init__(self, server: VllmServer, answer: Answer, deadline_s: float, reader: Reader, pool: PoolView) -> None:
        super().__init__(server.address.url, answer, deadline_s)
        self._server = server
        self._reader = reader
        self._pool = pool
        self._is_waiting = True
        server.num_waiting += 1

    def close(self) -> None:
        self._answered()
        super().close()

    async def chunks(self) -> AsyncGenerator[WorkerChunk, None]:
        """Events until the server says that it is done. Raises WorkerLost, or the error it reports."""
        end: WorkerChunk | None = None
        while payloads := await self.payloads():
            for payload in payloads:
                chunk = self._reader.read(payload)
                self._answered()
                if self._reader.part is Part.PREFILL and chunk.finish_reason is not None:
                    end = chunk
                yield chunk
        if end is not None:
            yield WorkerChunk(kv_transfer_params=await self._handed_over())

    def _answered(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._server.num_waiting -= 1

    async def _handed_over(self) -> KVTransfer:
        """When the prompt's full blocks can be found in the pool, or will not be."""
        facts, request = self._server.facts, self._reader.request
        if facts is None or not facts.is_pooled:
            return KVTransfer()
        size = facts.block_size
        keys = block_keys(request.prompt, size, first_block_extra=salt_extra(request.cache_salt))
        until_s = min(time.monotonic() + HAND_OVER_S_MAX, self._deadline_s)
        namespace = bytes.fromhex(facts.namespace)
        while await self._pool.count_blocks(namespace, keys) < len(keys):
            if time.monotonic() >= until_s or not self._pool.available:
                log.info("hand_over_failed", worker=self.url, blocks=len(keys))
                return KVTransfer()
            await asyncio.sleep(HAND_OVER_POLL_S)
        return KVTransfer(
            do_remote_prefill=True,
            num_tokens=len(keys) * size,
        )


class VllmClient(HttpDoor):
    """Connections to all vLLM servers that the settings name."""

    def __init__(
        self,
        addresses: Iterable[VllmAddress],
        model: str,
        golden: GoldenText,
        pool: PoolView,
        api_key: str | None = None,
    ) -> None:
        super().__init__()
        self._servers = {address.url: VllmServer(address) for address in addresses}
        self._model = model
        self._golden = golden
        self._pool = pool
        self._authorization = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def stream(self, url: str, request: WorkerRequest, deadline_s: float) -> VllmStream:
        """Start a completion. Raises before the first event what `dbnode.worker_base` says."""
        server = self._server(url)
        transfer = request.kv_transfer_params
        part = Part.PREFILL if transfer is not None and transfer.do_remote_decode else Part.ALL
        sent = _encode(body(request, server.model, part))
        answer = await self._complete(server.http_url, sent, request.headers)
        return VllmStream(server, answer, deadline_s, Reader(url, request, part), self._pool)

    async def info(self, url: str, timeout_s: float) -> WorkerFacts:
        """Who the server is, if its engine lives. Raises WorkerUnreachable that also says what does not fit."""
        server = self._server(url)
        await self.check_ready(url, timeout_s)
        text = await self._get(server.http_url, "/metrics", timeout_s)
        metrics = read_metrics(text.decode(errors="replace"))
        if not server.is_known(metrics):
            cards = decode_state(url, _decode_models, await self._get(server.http_url, "/v1/models", timeout_s)).data
            server.register(self._model, cards, metrics)
            try:
                await self._check_tokens(server, timeout_s)
                await self._ask_namespace(server)
            except WorkerUnreachable:
                server.facts = None
                raise
        server.take(metrics)
        assert server.facts is not None
        return server.facts

    async def check_ready(self, url: str, timeout_s: float) -> None:
        """Return if its engine lives. Raises WorkerUnreachable."""
        await self._get(self._server(url).http_url, "/health", timeout_s)

    async def load(self, url: str, timeout_s: float) -> WorkerLoad:
        """How busy it was when `info` was asked last."""
        return self._server(url).load

    async def ended_requests(self, url: str, request_ids: Sequence[str], timeout_s: float) -> list[EndedRequest]:
        """vLLM writes nothing down."""
        return []

    async def drop_cache(self, url: str, body: bytes, timeout_s: float) -> dict[str, Any]:
        """Make it forget its prefix cache, which vLLM offers in its development mode only."""
        server = self._server(url)
        try:
            await self._post(server.http_url, "/reset_prefix_cache", b"", timeout_s)
        except WorkerRefused as error:
            hint = "vLLM drops its cache only when started with VLLM_SERVER_DEV_MODE=1"
            raise WorkerRefused(error.message, hint=hint) from error
        return {"l1_blocks": server.load.l1_blocks_total, "l2_blocks": 0}

    async def _check_tokens(self, server: VllmServer, timeout_s: float) -> None:
        """Raises WorkerUnreachable if it makes other tokens of a text. A server that does not tell is believed."""
        asked = {"model": server.model, "prompt": self._golden.text, "add_special_tokens": False}
        try:
            answer = await self._post(server.http_url, "/tokenize", _encode(asked), timeout_s)
        except WorkerUnreachable:
            raise
        except StrataError as error:
            log.info("vllm_tokens_not_checked", worker=server.address.url, error=error.message)
            return
        found = decode_state(server.address.url, _decode_tokens, answer).tokens
        if found != self._golden.token_ids:
            raise WorkerUnreachable(
                f"{server.address.url} makes other tokens of a text than this DB node: it serves another model"
            )

    async def _ask_namespace(self, server: VllmServer) -> None:
        """Costs the server one token. Without a connector of ours there is no answer, and its blocks are in no pool."""
        if server.address.namespace:
            return
        asked = introduction(server.model, self._golden.token_ids[0])
        try:
            answer = await self._post(server.http_url, "/v1/completions", _encode(asked), INTRODUCTION_TIMEOUT_S)
            params = _decode_introduced(answer).kv_transfer_params
        except WorkerUnreachable:
            raise
        except (StrataError, msgspec.DecodeError) as error:
            log.info("vllm_namespace_not_known", worker=server.address.url, error=str(error))
            return
        if params is not None and params.stratakv is not None and is_namespace(params.stratakv.namespace):
            server.introduced(params.stratakv.namespace)

    def _server(self, url: str) -> VllmServer:
        server = self._servers.get(url)
        if server is None:
            raise WorkerUnreachable(f"{url} is not among the workers that this DB node was told")
        return server

    async def _ask(
        self, method: str, url: str, path: str, body: bytes = b"", headers: Mapping[str, str] = _NO_HEADERS
    ) -> Answer:
        return await self._http.ask(method, url, path, body, {**headers, **self._authorization})

    def _refusal(self, url: str, status: int, body: bytes) -> StrataError:
        return refusal(url, status, body)
