"""What the scheduler asks of the meta server: how much of a prompt is in the pool, and which workers have registered.

Everything is optional: without a meta server requests are routed by what the node itself knows. Owned by
`dbnode.scheduler.scheduler`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from stratakv.errors import StrataError, Unavailable
from stratakv.keys import BlockKey, pack_keys
from stratakv.log import EventLogger
from stratakv.wire import Done, FetchAhead, ListWorkers, Match, MatchPrefix, Message, Pinned, PinPrefix, ReplyT, Workers

log = EventLogger("dbnode.pool_view")

PEEK_TIMEOUT_S = 0.05
"""A prompt waits no longer than this to learn what the pool holds of it."""
FETCHES_MAX = 16
"""Orders to fetch ahead that are not answered yet; beyond it nothing is fetched ahead."""
KEYS_MAX = 65_536
"""Keys of one message; what lies behind them is not asked for."""


class MetaCalls(Protocol):
    """The part of `stratakv.pool.meta_client.MetaClient` that is used here."""

    @property
    def available(self) -> bool: ...

    async def call(self, request: Message, reply_type: type[ReplyT], timeout_s: float | None = None) -> ReplyT: ...


class PoolView:
    """The meta server as the scheduler sees it."""

    def __init__(self, meta: MetaCalls | None) -> None:
        self._meta = meta
        self._peeks: set[asyncio.Task[int]] = set()
        self._fetches: set[asyncio.Task[None]] = set()

    @property
    def available(self) -> bool:
        """Whether the pool can be used to hand a prompt from one worker to another."""
        return self._meta is not None and self._meta.available

    async def count_blocks(self, namespace: bytes, keys: Sequence[BlockKey]) -> int:
        """Leading blocks in the pool; 0 when nobody answers in time."""
        if self._meta is None or not self._meta.available or not keys:
            return 0
        # A call that times out counts as a lost server, so a late answer is left to come by itself.
        peek = asyncio.create_task(self._peek(self._meta, namespace, keys), name="pool-peek")
        self._peeks.add(peek)
        peek.add_done_callback(self._peeks.discard)
        await asyncio.wait({peek}, timeout=PEEK_TIMEOUT_S)
        return peek.result() if peek.done() else 0

    async def _peek(self, meta: MetaCalls, namespace: bytes, keys: Sequence[BlockKey]) -> int:
        request = MatchPrefix(namespace=namespace, keys=pack_keys(keys[:KEYS_MAX]), lease_s=0.0)
        try:
            return (await meta.call(request, Match)).num_blocks
        except StrataError as error:
            log.debug("pool_peek_failed", error=error.message)
            return 0

    def fetch_ahead(self, namespace: bytes, keys: Sequence[BlockKey]) -> None:
        """Have blocks that a waiting request will need brought from disk to memory. Nobody waits for it."""
        if self._meta is None or not self._meta.available or not keys or len(self._fetches) >= FETCHES_MAX:
            return
        fetch = asyncio.create_task(self._fetch(self._meta, namespace, keys), name="fetch-ahead")
        self._fetches.add(fetch)
        fetch.add_done_callback(self._fetches.discard)

    async def _fetch(self, meta: MetaCalls, namespace: bytes, keys: Sequence[BlockKey]) -> None:
        try:
            await meta.call(FetchAhead(namespace, pack_keys(keys[:KEYS_MAX])), Done)
        except StrataError as error:
            log.debug("fetch_ahead_failed", error=error.message)

    async def pin(self, namespace: bytes, keys: Sequence[BlockKey], pin_s: float) -> Pinned:
        """Keep the leading blocks that are in the pool. Raises StrataError."""
        if self._meta is None:
            raise Unavailable("this DB node has no meta server, and so no pool")
        return await self._meta.call(PinPrefix(namespace, pack_keys(keys[:KEYS_MAX]), pin_s), Pinned)

    async def worker_urls(self) -> list[str] | None:
        """URLs of the workers that have registered; None when nobody answers."""
        if self._meta is None:
            return None
        try:
            reply = await self._meta.call(ListWorkers(), Workers)
        except StrataError as error:
            log.debug("list_workers_failed", error=error.message)
            return None
        return [state.info.url for state in reply.workers]
