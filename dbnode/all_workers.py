"""One door to workers of both makers: which of them it is, the URL says. Made by `dbnode.node`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dbnode.worker_base import WorkerDoor, WorkerStream
from dbnode.worker_messages import EndedRequest, WorkerFacts, WorkerRequest
from stratakv.wire import WorkerLoad
from stratakv.worker_address import VLLM_SCHEME


class AllWorkers:
    """A `WorkerDoor` over two others, which it owns."""

    def __init__(self, own: WorkerDoor, vllm: WorkerDoor) -> None:
        self._own = own
        self._vllm = vllm

    def _of(self, url: str) -> WorkerDoor:
        return self._vllm if url.startswith(VLLM_SCHEME) else self._own

    async def close(self) -> None:
        await self._own.close()
        await self._vllm.close()

    async def stream(self, url: str, request: WorkerRequest, deadline_s: float) -> WorkerStream:
        return await self._of(url).stream(url, request, deadline_s)

    async def info(self, url: str, timeout_s: float) -> WorkerFacts:
        return await self._of(url).info(url, timeout_s)

    async def check_ready(self, url: str, timeout_s: float) -> None:
        await self._of(url).check_ready(url, timeout_s)

    async def load(self, url: str, timeout_s: float) -> WorkerLoad:
        return await self._of(url).load(url, timeout_s)

    async def ended_requests(self, url: str, request_ids: Sequence[str], timeout_s: float) -> list[EndedRequest]:
        return await self._of(url).ended_requests(url, request_ids, timeout_s)

    async def drop_cache(self, url: str, body: bytes, timeout_s: float) -> dict[str, Any]:
        return await self._of(url).drop_cache(url, body, timeout_s)
