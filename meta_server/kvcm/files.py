"""What storages hold: makes what clients write into, deletes what nobody is told of any more, looks how each storage is.

Deletion is asynchronous and never loses a file: a block counts as deleted once its file is gone, and until then its session
stays in the database, so that a restart begins again. File systems may hang: each storage has threads of its own, and nothing
here is waited for without a limit.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

from meta_server.kvcm.backends import Backend, make_backend
from meta_server.kvcm.entities import Health, HealthState, Storage
from meta_server.kvcm.errors import StorageFailed
from meta_server.kvcm.writes import Place, Write
from meta_server.presence import Clock
from stratakv.log import EventLogger

MAKE_TIMEOUT_S = 5.0
DELETE_BATCH_MAX = 1000
"""Chunks of one storage in one turn; the others wait for the next one."""
DELETIONS_MAX = 100_000
"""Chunks that wait; for more the caller asks again when `has_room`."""
RETRY_S = 10.0
WATER_HIGH = 0.95
"""Share of a storage in use at which it takes no new blocks."""
WATER_LOW = 0.90
"""Share in use down to which it stays so."""
_log = EventLogger("meta_server.kvcm")

T = TypeVar("T")
Chunk = tuple[Write, int]


class _Shelf:
    """One storage's threads, and its chunks that wait for their deletion."""

    def __init__(self, place: Place) -> None:
        self.backend: Backend = make_backend(place)
        self.making = ThreadPoolExecutor(1, "kvcm-make")
        self.deleting = ThreadPoolExecutor(1, "kvcm-delete")
        self.prepared: set[str] = set()
        self.due: list[tuple[float, int, Chunk]] = []
        self.num_waiting = 0
        """Chunks that are due, or being deleted."""
        self.num_tries = 0
        """Of making and checking, under way."""
        self.turn: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        return not self.num_waiting and not self.num_tries

    def close(self) -> None:
        self.making.shutdown(wait=False, cancel_futures=True)
        self.deleting.shutdown(wait=False, cancel_futures=True)


class Files:
    """All storages, by where they are."""

    def __init__(self, clock: Clock, deleted: Callable[[list[Chunk]], None], probe_s: float) -> None:
        """`deleted` is told of chunks whose files are gone."""
        self._clock = clock
        self._deleted = deleted
        self._probe_s = probe_s
        self._shelves: dict[Place, _Shelf] = {}
        self._numbers = count()
        self._waiting: set[Chunk] = set()
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._probe_at = clock()

    async def prepare(self, place: Place, instance_id: str) -> None:
        """Make what the instance's clients write into, once. Raises StorageFailed."""
        shelf = self._shelf(place)
        if instance_id in shelf.prepared:
            return
        await self._try(lambda: shelf.backend.prepare(instance_id), place)
        shelf.prepared.add(instance_id)

    async def check(self, place: Place) -> None:
        """Raises StorageFailed unless the storage can be written to."""
        await self._try(self._shelf(place).backend.check, place)

    async def _try(self, action: Callable[[], T], place: Place) -> T:
        loop, shelf = asyncio.get_running_loop(), self._shelf(place)
        shelf.num_tries += 1
        try:
            return await asyncio.wait_for(loop.run_in_executor(shelf.making, action), MAKE_TIMEOUT_S)
        except TimeoutError:
            raise StorageFailed(f"storage {place.storage}: {place.root} does not answer") from None
        except OSError as error:
            raise StorageFailed(f"storage {place.storage}: {place.root}: {error.strerror}") from error
        finally:
            shelf.num_tries -= 1

    @property
    def has_room(self) -> bool:
        """Whether many more chunks may wait."""
        return len(self._waiting) < DELETIONS_MAX // 2

    def waiting(self, place: Place) -> int:
        """Chunks of a storage that are still to be deleted."""
        shelf = self._shelves.get(place)
        return shelf.num_waiting if shelf is not None else 0

    def is_waiting(self, chunk: Chunk) -> bool:
        """Whether it is still to be deleted."""
        return chunk in self._waiting

    def delete(self, chunk: Chunk, delay_s: float) -> bool:
        """Delete a chunk's files after a while; False if too many wait."""
        if len(self._waiting) >= DELETIONS_MAX:
            return False
        self._waiting.add(chunk)
        shelf = self._shelf(chunk[0].place)
        shelf.num_waiting += 1
        heapq.heappush(shelf.due, (self._clock() + delay_s, next(self._numbers), chunk))
        return True

    def tick(self, storages: list[Storage]) -> None:
        """Begin to delete what is due, and to look at storages, where the turn before is over."""
        now, loop = self._clock(), asyncio.get_running_loop()
        for shelf in self._shelves.values():
            if shelf.due and shelf.due[0][0] <= now and (shelf.turn is None or shelf.turn.done()):
                shelf.turn = loop.create_task(self._delete_due(shelf))
        if now < self._probe_at:
            return
        self._probe_at = now + self._probe_s
        places = {storage.place for storage in storages}
        for place in [place for place, shelf in self._shelves.items() if place not in places and shelf.is_idle]:
            self._shelves.pop(place).close()
        self._probes = {name: task for name, task in self._probes.items() if not task.done()}
        for storage in storages:
            if storage.name not in self._probes:
                self._probes[storage.name] = loop.create_task(self._probe(storage))

    async def _probe(self, storage: Storage) -> None:
        place = storage.place
        shelf = self._shelf(place)
        try:
            share = await self._try(lambda: _look(shelf.backend), place)
        except StorageFailed as error:
            found = Health(HealthState.FAILING, str(error))
            if isinstance(error.__cause__, FileNotFoundError):
                # Its root is made when the next block is written; until then there is nothing to say.
                shelf.prepared.clear()
                found = Health()
        else:
            level = WATER_LOW if storage.health.state is HealthState.FULL else WATER_HIGH
            is_full = share is not None and share >= level
            found = Health(HealthState.FULL if is_full else HealthState.HEALTHY, "", share)
        if found.state is not storage.health.state:
            _log.info("storage_health", storage=storage.name, health=found.state.name, detail=found.detail)
        storage.health = found

    async def _delete_due(self, shelf: _Shelf) -> None:
        chunks: list[Chunk] = []
        while shelf.due and shelf.due[0][0] <= self._clock() and len(chunks) < DELETE_BATCH_MAX:
            chunks.append(heapq.heappop(shelf.due)[2])
        loop = asyncio.get_running_loop()
        failed = await loop.run_in_executor(shelf.deleting, _delete_all, shelf.backend, chunks)
        self._waiting.difference_update(chunks)
        shelf.num_waiting -= len(chunks)
        for chunk, error in failed.items():
            _log.warning("file_not_deleted", storage=chunk[0].place.storage, error=error)
            self.delete(chunk, RETRY_S)
        self._deleted([chunk for chunk in chunks if chunk not in failed])

    def _shelf(self, place: Place) -> _Shelf:
        if (shelf := self._shelves.get(place)) is None:
            shelf = self._shelves[place] = _Shelf(place)
        return shelf

    async def close(self) -> None:
        """End; what waits is found again at the next start."""
        turns = [shelf.turn for shelf in self._shelves.values() if shelf.turn is not None]
        tasks = [*turns, *self._probes.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for shelf in self._shelves.values():
            shelf.close()


def _look(backend: Backend) -> float | None:
    share = backend.used_share()
    backend.check()
    return share


def _delete_all(backend: Backend, chunks: list[Chunk]) -> dict[Chunk, str]:
    failed: dict[Chunk, str] = {}
    for write, chunk in chunks:
        try:
            backend.delete(write.instance_id, write.names(chunk))
        except OSError as error:
            failed[(write, chunk)] = str(error)
    return failed
