"""The files of storages: makes the directory that clients write into, deletes what nobody is told of any more.

Deletion is asynchronous and never loses a file: a block counts as deleted once its file is gone, and until then its session
stays in the database, so that a restart begins again. File systems may hang: everything runs on threads of their own.
"""

from __future__ import annotations

import asyncio
import heapq
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from meta_server.kvcm.errors import StorageFailed
from meta_server.kvcm.writes import Place, Write, instance_directory
from meta_server.presence import Clock
from stratakv.log import EventLogger

MAKE_TIMEOUT_S = 5.0
DELETE_BATCH_MAX = 1000
"""Chunks of one turn; the others wait for the next one."""
RETRY_S = 30.0
_log = EventLogger("meta_server.kvcm")

Chunk = tuple[Write, int]


class Files:
    """Directories made, and chunks that wait for their deletion."""

    def __init__(self, clock: Clock, deleted: Callable[[list[Chunk]], None]) -> None:
        """`deleted` is told of chunks whose files are gone."""
        self._clock = clock
        self._deleted = deleted
        self._making = ThreadPoolExecutor(2, "kvcm-make")
        self._deleting = ThreadPoolExecutor(1, "kvcm-delete")
        self._made: set[str] = set()
        self._due: list[tuple[float, int, Chunk]] = []
        self._numbers = count()
        self._turn: asyncio.Task[None] | None = None

    async def prepare(self, place: Place, instance_id: str) -> None:
        """Make the instance's directory, once. Raises StorageFailed."""
        directory = instance_directory(place, instance_id)
        if directory in self._made:
            return
        await self._try(lambda: os.makedirs(directory, exist_ok=True), place)
        self._made.add(directory)

    async def check(self, place: Place) -> None:
        """Raises StorageFailed unless files can be made at the storage's root."""
        await self._try(lambda: _probe(place.root), place)

    async def _try(self, action: Callable[[], None], place: Place) -> None:
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(loop.run_in_executor(self._making, action), MAKE_TIMEOUT_S)
        except TimeoutError:
            raise StorageFailed(f"storage {place.storage}: {place.root} does not answer") from None
        except OSError as error:
            raise StorageFailed(f"storage {place.storage}: {place.root}: {error.strerror}") from None

    def delete(self, chunk: Chunk, delay_s: float) -> None:
        """Delete a chunk's files after a while."""
        heapq.heappush(self._due, (self._clock() + delay_s, next(self._numbers), chunk))

    def tick(self) -> None:
        """Begin to delete what is due, if the turn before is over."""
        if self._due and self._due[0][0] <= self._clock() and (self._turn is None or self._turn.done()):
            self._turn = asyncio.get_running_loop().create_task(self._delete_due())

    async def _delete_due(self) -> None:
        chunks: list[Chunk] = []
        while self._due and self._due[0][0] <= self._clock() and len(chunks) < DELETE_BATCH_MAX:
            chunks.append(heapq.heappop(self._due)[2])
        failed = await asyncio.get_running_loop().run_in_executor(self._deleting, _unlink_all, chunks)
        for chunk, error in failed.items():
            _log.warning("file_not_deleted", storage=chunk[0].place.storage, error=error)
            self.delete(chunk, RETRY_S)
        self._deleted([chunk for chunk in chunks if chunk not in failed])

    async def close(self) -> None:
        """End; what waits is found again at the next start."""
        if self._turn is not None:
            self._turn.cancel()
            await asyncio.gather(self._turn, return_exceptions=True)
        self._making.shutdown(wait=False, cancel_futures=True)
        self._deleting.shutdown(wait=False, cancel_futures=True)


def _unlink_all(chunks: list[Chunk]) -> dict[Chunk, str]:
    failed: dict[Chunk, str] = {}
    for write, chunk in chunks:
        try:
            for path in write.files(chunk):
                path.unlink(missing_ok=True)
        except OSError as error:
            failed[(write, chunk)] = str(error)
    return failed


def _probe(root: str) -> None:
    probe = Path(root) / f".stratakv-probe-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()
