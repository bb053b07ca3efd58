"""Moving bytes between this process and one daemon's segment: the interface that every transport has.

Calls block and come from worker threads, several at once; never from an event loop. Deadlines are readings of
`time.monotonic`. A daemon that is dead, frozen or unreachable costs at most the deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from stratakv._native import Gate, LayerMove, PageHeaders
from stratakv._native.base import Int64s, UInt64s
from stratakv.pool.errors import TransferCancelled

Buffer = bytes | memoryview


class ReadRange(NamedTuple):
    """Bytes of the segment and where they go; `into` is writable, contiguous, of format B. Any such pair will do."""

    offset: int
    into: memoryview


class WriteRange(NamedTuple):
    """Bytes and where in the segment they go; `source` is contiguous, of format B. Any such pair will do."""

    offset: int
    source: Buffer


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Layers of pages, and where they lie on both sides: page i at `offsets[i]` of the segment and in row `rows[i]` here."""

    offsets: Int64s
    layers: Sequence[LayerMove]
    rows: Int64s


class Cancellation:
    """Lets one thread stop a transfer of another; the transfer then raises TransferCancelled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stops: list[Callable[[], None]] = []
        self._is_cancelled = False

    def cancel(self) -> None:
        """Safe to call more than once, before, during or after the transfer."""
        with self._lock:
            self._is_cancelled = True
            stops, self._stops = self._stops, []
        for stop in stops:
            stop()

    def check(self) -> None:
        """Raises TransferCancelled after `cancel`."""
        if self._is_cancelled:
            raise TransferCancelled("the transfer was given up")

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """While inside, `cancel` calls `stop`, which must make the blocked call return."""
        with self._lock:
            self.check()
            self._stops.append(stop)
        try:
            yield
        finally:
            with self._lock:
                if stop in self._stops:
                    self._stops.remove(stop)


class Transport(Protocol):
    """Scatter/gather access to one segment."""

    def read_batch(
        self,
        ranges: Sequence[tuple[int, memoryview]],
        *,
        deadline: float,
        on_range: Callable[[int], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Fill the ranges in order. `on_range(n)`, called every so often and at the end, says that the first n are filled.

        What `on_range` raises ends the transfer. Raises TransportError, OutOfBounds, TransferCancelled; the ranges beyond the
        last `on_range` then hold anything.
        """

    def write_batch(
        self,
        put_id: bytes,
        ranges: Sequence[tuple[int, Buffer]],
        *,
        deadline: float,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Write into the pages of an unfinished put; on return the daemon's memory has the bytes.

        Safe to repeat. Raises TransportError, PutRefused, OutOfBounds, TransferCancelled.
        """

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
        """Copy the layers in order and check them against `checksums` [layer][page].

        With `headers` all layers are asked for, and the pages' headers are read and checked first, which tell the checksums.

        `done` opens behind each layer that is there and verified for every page; what lies at the destination of others may
        be anything. A cancelled transfer closes it. Raises DamagedPage, StalePage, TransportError, OutOfBounds, TransferCancelled.
        """

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
        """Write the layers into the pages of an unfinished put, each as soon as `ready` lets it pass; fill `checksums`.

        With `headers` all layers are given, and each page's header is written behind its last layer.

        Raises TransferCancelled when `ready` is closed, TransportError, PutRefused, OutOfBounds.
        """

    def mapping(self) -> memoryview | None:
        """The whole segment, writable, without a copy; None where only messages reach it."""

    def put_opened(self, put_id: bytes, deadline: float) -> None:
        """The daemon has granted pages for this put until the deadline."""

    def put_closed(self, put_id: bytes) -> None:
        """This process writes no more for the put."""

    def close(self) -> None:
        """Let go of the segment; transfers in progress fail."""


class ReadBatch(Protocol):
    """`Transport.read_batch`."""

    def __call__(
        self,
        ranges: list[ReadRange],
        *,
        deadline: float,
        on_range: Callable[[int], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> None: ...


class WriteBatch(Protocol):
    """`Transport.write_batch`."""

    def __call__(self, put_id: bytes, ranges: list[WriteRange], *, deadline: float) -> None: ...
