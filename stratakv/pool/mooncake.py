"""Transport by Mooncake's Transfer Engine: one-sided reads and writes of a daemon's segment, over RDMA or TCP.

The daemon registers its segment (`TransferEngine.register`) and tells where it is when a client attaches. Bytes land in staging
memory that belongs to the engine and are copied from there, so that a transfer that outlives its deadline harms nobody: its
staging memory is used again only when the engine is through with it. As with shared memory the daemon sees no write, so this
side keeps to the put's time itself. The package is optional: `stratakv[mooncake]`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import mmap
import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from stratakv._native import Gate, PageHeaders
from stratakv._native.base import UInt64s
from stratakv.errors import SetupError
from stratakv.pool.errors import OutOfBounds, TransportError, TransportTimeout
from stratakv.pool.framing import remaining_s
from stratakv.pool.page_ranges import read_by_ranges, write_by_ranges
from stratakv.pool.put_times import PutTimes
from stratakv.pool.transport import Buffer, Cancellation, PageBatch
from stratakv.settings import TransferProtocol

SLAB_BYTES = 16 * 1024 * 1024
SLABS_MAX = 4
"""Transfers at once; further ones wait."""
RANGES_MAX = 64
"""Ranges in one call of the engine, which queues no more than a few hundred for a peer."""
ADAPTERS = Path("/sys/class/infiniband")
CONNECTION_POOL_ENV = "MC_TCP_ENABLE_CONNECTION_POOL"
"""Without it the engine dials for every range over TCP."""

_Piece = tuple[int, int, memoryview]
"""Index of the range, offset in the segment, the caller's bytes."""


class _Slab:
    """Staging memory of one transfer."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, SLAB_BYTES)
        self.memory = memoryview(self._map)
        self.address = address_of(self._map)


def address_of(memory: mmap.mmap) -> int:
    """Where a writable mapping lies in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class TransferEngine:
    """The one engine of a process."""

    def __init__(self, host: str, protocol: TransferProtocol) -> None:
        """`host` is where others reach this process. Raises SetupError."""
        self._engine = _made(host, protocol)
        self.name = f"{host}:{self._engine.get_rpc_port()}"
        """What peers know this engine by."""
        self._threads = ThreadPoolExecutor(SLABS_MAX, thread_name_prefix="transfer")
        self._slabs: queue.SimpleQueue[_Slab] = queue.SimpleQueue()
        for _ in range(SLABS_MAX):
            slab = _Slab()
            self.register(slab.address, SLAB_BYTES)
            self._slabs.put(slab)

    def register(self, address: int, size_bytes: int) -> None:
        """Let peers reach this memory. Raises SetupError."""
        if self._engine.register_memory(address, size_bytes) != 0:
            raise SetupError(f"Mooncake's Transfer Engine cannot register {size_bytes} bytes of memory")

    def take_slab(self, deadline: float) -> _Slab:
        """Raises TransportTimeout."""
        try:
            return self._slabs.get(timeout=remaining_s(deadline))
        except queue.Empty:
            raise TransportTimeout("all staging memory is in use") from None

    def give_back(self, slab: _Slab) -> None:
        self._slabs.put(slab)

    def move(
        self, peer: str, *, reads: bool, local: Sequence[int], remote: Sequence[int], sizes: Sequence[int]
    ) -> Future[int]:
        """One call of the engine, which takes as long as it takes; 0 for success."""
        call = self._engine.batch_transfer_sync_read if reads else self._engine.batch_transfer_sync_write
        return self._threads.submit(call, peer, list(local), list(remote), list(sizes))


def _made(host: str, protocol: TransferProtocol) -> Any:
    try:
        module = importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise SetupError(
            f"pool.transfer_engine = {protocol}: {error}",
            hint="pip install 'stratakv[mooncake]'; it needs libibverbs1 and librdmacm1 of the distribution",
        ) from error
    if protocol is TransferProtocol.RDMA and not (ADAPTERS.is_dir() and any(ADAPTERS.iterdir())):
        # The engine itself would take TCP and say nothing.
        raise SetupError("pool.transfer_engine = rdma: this machine has no RDMA adapter")
    os.environ.setdefault(CONNECTION_POOL_ENV, "1")
    engine = module.TransferEngine()
    if engine.initialize(host, "P2PHANDSHAKE", protocol.value, "") != 0:
        raise SetupError(f"pool.transfer_engine = {protocol}: Mooncake's Transfer Engine does not start on {host}")
    return engine


@functools.cache
def transfer_engine(host: str, protocol: TransferProtocol) -> TransferEngine | None:
    """The engine of this process; None if none is wanted. Raises SetupError."""
    return None if protocol is TransferProtocol.OFF else TransferEngine(host, protocol)


class MooncakeTransport:
    """One segment at `address` of `peer`. `check_daemon(deadline)` raises TransportError unless that epoch still lives."""

    def __init__(
        self, engine: TransferEngine, peer: str, address: int, size_bytes: int, check_daemon: Callable[[float], None]
    ) -> None:
        self._engine = engine
        self._peer = peer
        self._address = address
        self._size_bytes = size_bytes
        self._check_daemon = check_daemon
        self._put_times = PutTimes()

    def read_batch(
        self,
        ranges: Sequence[tuple[int, memoryview]],
        *,
        deadline: float,
        on_range: Callable[[int], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        for pieces in self._groups(ranges, deadline):
            self._move(pieces, reads=True, deadline=deadline, cancellation=cancellation)
            if on_range is not None:
                last, offset, part = pieces[-1]
                is_whole = offset + len(part) == ranges[last][0] + len(ranges[last][1])
                on_range(last + is_whole)

    def write_batch(
        self,
        put_id: bytes,
        ranges: Sequence[tuple[int, Buffer]],
        *,
        deadline: float,
        cancellation: Cancellation | None = None,
    ) -> None:
        views = [(offset, memoryview(source)) for offset, source in ranges]
        for pieces in self._groups(views, deadline):
            self._put_times.check(put_id)
            self._move(pieces, reads=False, deadline=deadline, cancellation=cancellation)

    def read_pages(
        self,
        batch: PageBatch,
        checksums: UInt64s,
        *,
        deadline: float,
        done: Gate,
        cancellation: Cancellation | None = None,
        headers: PageHeaders | None = None,
    ) -> None:
        read_by_ranges(
            self.read_batch, batch, checksums, deadline=deadline, done=done, cancellation=cancellation, headers=headers
        )

    def write_pages(
        self,
        put_id: bytes,
        batch: PageBatch,
        checksums: UInt64s,
        *,
        deadline: float,
        ready: Gate,
        headers: PageHeaders | None = None,
    ) -> None:
        write_by_ranges(self.write_batch, put_id, batch, checksums, deadline=deadline, ready=ready, headers=headers)

    def mapping(self) -> memoryview | None:
        return None

    def put_opened(self, put_id: bytes, deadline: float) -> None:
        self._put_times.opened(put_id, deadline)

    def put_closed(self, put_id: bytes) -> None:
        self._put_times.closed(put_id)

    def close(self) -> None:
        """The engine serves other connections too, and stays."""

    def _groups(self, ranges: Sequence[tuple[int, memoryview]], deadline: float) -> list[list[_Piece]]:
        """What one call moves each: pieces that fit a slab. Raises OutOfBounds; TransportError if the daemon is gone."""
        for offset, part in ranges:
            if offset < 0 or not 0 < len(part) <= self._size_bytes - offset:
                raise OutOfBounds("a range lies outside the segment, or is empty")
        # What another epoch's process has at the same address must not be touched.
        self._check_daemon(deadline)
        groups: list[list[_Piece]] = []
        room = 0
        for index, (offset, part) in enumerate(ranges):
            for at in range(0, len(part), SLAB_BYTES):
                piece = part[at : at + SLAB_BYTES]
                if not groups or len(piece) > room or len(groups[-1]) == RANGES_MAX:
                    groups.append([])
                    room = SLAB_BYTES
                groups[-1].append((index, offset + at, piece))
                room -= len(piece)
        return groups

    def _move(self, pieces: list[_Piece], *, reads: bool, deadline: float, cancellation: Cancellation | None) -> None:
        slab = self._engine.take_slab(deadline)
        sizes = [len(part) for _, _, part in pieces]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        staged = [slab.memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        if not reads:
            for (_, _, part), place in zip(pieces, staged, strict=True):
                place[:] = part
        moving = self._engine.move(
            self._peer,
            reads=reads,
            local=[slab.address + start for start in starts],
            remote=[self._address + offset for _, offset, _ in pieces],
            sizes=sizes,
        )
        try:
            self._await(moving, deadline, cancellation)
            if reads:
                for (_, _, part), place in zip(pieces, staged, strict=True):
                    part[:] = place
        finally:
            moving.add_done_callback(lambda _: self._engine.give_back(slab))

    def _await(self, moving: Future[int], deadline: float, cancellation: Cancellation | None) -> None:
        given_up: Future[None] = Future()
        with (cancellation or Cancellation()).stopping(lambda: given_up.set_result(None)):
            either: list[Future[Any]] = [moving, given_up]
            done, _ = wait(either, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
        if cancellation is not None:
            cancellation.check()
        if not done:
            raise TransportTimeout("the deadline passed")
        if moving.result() != 0:
            raise TransportError("the transfer engine could not reach the daemon's memory")
