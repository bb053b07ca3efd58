"""The decode worker's side: brings a prompt's KV into L1 while another worker computes it, and learns the first token.

Called by `workers.runtime` before a request enters the engine. What is in the pool already is loaded as ever. What is being
written is read layer by layer, as the other worker tells of each. A block is registered in L1 only when all its layers are
there and each was found to be what was told. Nothing here can spoil an answer: blocks that did not come are looked up again
or computed by the request itself.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from stratakv.errors import StrataError
from stratakv.keys import BlockKey, Namespace, unpack_keys
from stratakv.layout import CorruptPage
from stratakv.log import EventLogger
from workers.engine.connector import KVLoadError, LoadJob, Tier
from workers.engine.reservations import HeldBlocks, Reservations
from workers.handover.client import HandoverClient
from workers.handover.errors import HandoverFailed
from workers.handover.messages import Alive, Answered, AnyMessage, GivenUp, Placed, Saved, Written
from workers.metrics import WorkerMetrics
from workers.tiers.announced import AnnouncedLoad
from workers.tiers.tiers import Tiers

log = EventLogger("workers.handover")

READERS = 2
"""Threads that read announced layers, for all hand-overs together."""
ENGINE_S_MAX = 30.0
"""The engine gets to a reservation between two steps."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TakenOver:
    """What a hand-over has brought."""

    token_ids: list[int]
    """Generated already, by the worker that computed the prompt."""
    held: HeldBlocks
    """Blocks of the prompt in L1, the caller's to release."""


class HandoverTaker:
    """All hand-overs to this worker."""

    def __init__(
        self,
        namespace: Namespace,
        tiers: Tiers,
        reservations: Reservations,
        num_cached: Callable[[Sequence[BlockKey]], int],
        client: HandoverClient,
        metrics: WorkerMetrics,
    ) -> None:
        self.namespace = namespace
        self.tiers = tiers
        self.reservations = reservations
        self.client = client
        self.threads = ThreadPoolExecutor(READERS, thread_name_prefix="kv-handover")
        self._num_cached = num_cached
        self._metrics = metrics
        self._running: set[asyncio.Task[TakenOver]] = set()

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self.client.close()
        await asyncio.to_thread(self.threads.shutdown)

    async def take(self, url: str, request_id: str, keys: Sequence[BlockKey]) -> TakenOver:
        """Bring what can be brought of a prompt with these keys. Raises HandoverFailed.

        Failed, or cancelled, it leaves nothing reserved: in a task of its own it waits for its threads, however often the
        caller is cancelled.
        """
        task = asyncio.create_task(self._take(url, request_id, keys), name=f"handover-{request_id}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            task.add_done_callback(self._give_back)
            raise

    def _give_back(self, task: asyncio.Task[TakenOver]) -> None:
        """Nobody wants the result any more."""
        if not task.cancelled() and task.exception() is None:
            self.reservations.release(task.result().held.blocks)

    async def _take(self, url: str, request_id: str, keys: Sequence[BlockKey]) -> TakenOver:
        first = self._num_cached(keys)
        reserved = await self._reserve(len(keys) - first)
        handover = _Handover(self, keys, first, reserved)
        try:
            taken = await handover.run(url, request_id)
        except BaseException as error:
            self.reservations.release(reserved)
            self._metrics.handover("failed" if isinstance(error, HandoverFailed) else "cancelled")
            raise
        self.reservations.release(list(set(reserved) - set(taken.held.blocks)))
        self._metrics.handover("whole" if handover.is_whole else "part")
        return taken

    async def _reserve(self, num_blocks: int) -> list[int]:
        """None if there is no room for all of them. Raises HandoverFailed."""
        if not num_blocks:
            return []
        reserving = self.reservations.reserve(num_blocks)
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(reserving)), ENGINE_S_MAX)
        except (TimeoutError, asyncio.CancelledError) as error:
            reserving.add_done_callback(lambda done: self.reservations.release(done.result()))
            if isinstance(error, TimeoutError):
                raise HandoverFailed("the engine has no time to reserve room in L1") from None
            raise


@dataclass(slots=True)
class _Put:
    """One put of the other worker that holds blocks of the prompt."""

    columns: list[int]
    """Which of its pages."""
    num_pages: int
    keys: list[BlockKey]
    blocks: list[int]
    load: AnnouncedLoad
    told: list[Written] = field(default_factory=list)
    """Not read yet."""
    layers_read: set[int] = field(default_factory=set)
    is_reading: bool = False

    def checksums(self, told: Written) -> bytes:
        """Of our pages. Raises ValueError."""
        every = np.frombuffer(told.checksums, dtype="<u8").reshape(len(told.layers), self.num_pages)
        return every[:, self.columns].tobytes()


class _Handover:
    """One hand-over while it runs."""

    def __init__(
        self, taker: HandoverTaker, keys: Sequence[BlockKey], first_block: int, reserved: Sequence[int]
    ) -> None:
        self._taker = taker
        self._keys = keys
        self._first_block = first_block
        self._unclaimed = dict(zip(keys[first_block:], reserved, strict=False))
        """L1 blocks reserved for blocks of the prompt that nothing loads yet."""
        self._missing = set(keys[first_block:])
        self._puts: dict[int, _Put] = {}
        self._held: dict[int, Tier] = {}
        self._answer: Answered | None = None
        self._saved: Saved | None = None
        self._failure: StrataError | None = None
        self._is_loading = bool(self._unclaimed)
        self._settled = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_whole(self) -> bool:
        return not self._missing

    async def run(self, url: str, request_id: str) -> TakenOver:
        """On return no thread of it writes into L1 any more. Raises HandoverFailed."""
        self._spawn(self._follow(url, request_id))
        if self._is_loading:
            self._spawn(self._load_pooled())
        try:
            await self._settled.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._answer is None:
            raise HandoverFailed(self._failure.message if self._failure else "the prompt has not been computed")
        if self._missing and self._saved is not None and not self._saved.is_whole:
            raise HandoverFailed("the prompt's blocks did not get into the pool")
        return TakenOver(self._answer.token_ids, HeldBlocks(list(self._held), list(self._held.values())))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(self._guarded(work)))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except StrataError as error:
            self._failure = error
        except Exception:
            log.exception("handover_failed")
            self._failure = HandoverFailed("the hand-over failed")
        self._look()

    def _look(self) -> None:
        """Settled when everything is there, or nothing more will come."""
        is_busy = self._is_loading or any(put.is_reading for put in self._puts.values())
        is_over = self._failure is not None or self._saved is not None
        is_there = self._answer is not None and not self._missing
        if is_there or (is_over and (self._answer is None or not is_busy)):
            self._settled.set()

    async def _follow(self, url: str, request_id: str) -> None:
        async with aclosing(self._taker.client.follow(url, request_id)) as told:
            async for message in told:
                self._hear(message)
                self._look()
        raise HandoverFailed(f"{url} has no more to tell")

    def _hear(self, message: AnyMessage) -> None:
        match message:
            case Placed():
                self._place(message)
            case Written():
                self._read_soon(message)
            case Answered(finish_reason="length"):
                self._answer = message
            case Answered():
                raise HandoverFailed("the answer has ended with its first token")
            case GivenUp():
                raise HandoverFailed(message.reason)
            case Saved():
                self._saved = message
            case Alive():
                pass

    def _place(self, message: Placed) -> None:
        keys = unpack_keys(message.keys)
        if message.namespace != self._taker.namespace or len(keys) != len(message.extents):
            raise HandoverFailed("the other worker's pages are of another kind")
        columns = [index for index, key in enumerate(keys) if key in self._unclaimed]
        if not columns:
            return
        ours = [keys[index] for index in columns]
        blocks = [self._unclaimed.pop(key) for key in ours]
        load = self._taker.tiers.announced(message.segment, [message.extents[index] for index in columns], blocks)
        self._puts[message.put] = _Put(columns, len(keys), ours, blocks, load)

    def _read_soon(self, message: Written) -> None:
        put = self._puts.get(message.put)
        if put is None:
            return
        put.told.append(message)
        if not put.is_reading:
            put.is_reading = True
            self._spawn(self._read(message.put, put))

    async def _read(self, number: int, put: _Put) -> None:
        """All that is told of a put till now. A put that turns out bad is left: its blocks will be looked up, or computed."""
        num_layers = self._taker.tiers.num_layers
        try:
            while put.told:
                told, put.told = put.told, []
                layers = [layer for message in told for layer in message.layers]
                if not all(0 <= layer < num_layers for layer in layers):
                    raise ValueError("there are no such layers")
                checksums = b"".join(map(put.checksums, told))
                await self._in_thread(partial(put.load.read, layers, checksums), put.load.cancel)
                put.layers_read.update(layers)
            if len(put.layers_read) == num_layers:
                self._taker.tiers.handed_over(len(put.keys), put.load.seconds)
                await self._register(put.keys, put.blocks, [Tier.POOL] * len(put.keys))
        except (StrataError, CorruptPage, ValueError) as error:
            log.info("handover_read_failed", pages=len(put.keys), error=str(error))
            del self._puts[number]
        finally:
            put.is_reading = False

    async def _load_pooled(self) -> None:
        """The leading blocks that are in the pool already."""
        try:
            hit = await self._taker.tiers.lookup(self._keys, self._first_block)
            if hit is None:
                return
            try:
                pages = list(itertools.takewhile(lambda page: page.key in self._unclaimed, hit.pages))
                keys = [page.key for page in pages]
                blocks = [self._unclaimed.pop(key) for key in keys]
                if not pages:
                    return
                load = hit.load(self._first_block, blocks)
                wait = partial(_num_loaded, load, self._taker.tiers.num_layers, len(pages))
                good = slice(await self._in_thread(wait, load.cancel))
                await self._register(keys[good], blocks[good], [page.tier for page in pages[good]])
            finally:
                hit.release()
        finally:
            self._is_loading = False

    async def _register(self, keys: Sequence[BlockKey], blocks: Sequence[int], tiers: Sequence[Tier]) -> None:
        if keys:
            await asyncio.wrap_future(self._taker.reservations.register(keys, blocks))
            self._held.update(zip(blocks, tiers, strict=True))
            self._missing.difference_update(keys)

    async def _in_thread(self, call: Callable[[], T], stop: Callable[[], None]) -> T:
        """Cancelled, it still waits for the call to end, which `stop` makes soon."""
        calling = asyncio.wrap_future(self._taker.threads.submit(call))
        try:
            return await asyncio.shield(calling)
        except asyncio.CancelledError:
            await asyncio.to_thread(stop)
            await asyncio.gather(calling, return_exceptions=True)
            raise


def _num_loaded(load: LoadJob, num_layers: int, num_blocks: int) -> int:
    """How many leading blocks of a load are whole, once it has ended."""
    try:
        load.wait_layer(num_layers - 1)
    except KVLoadError as error:
        return error.num_good_blocks
    return num_blocks
