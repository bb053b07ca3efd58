"""What goes into PostgreSQL and comes back: rows as values, and how pages are packed in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meta_server.page_arrays import ExtentArray
from stratakv.wire import CacheRule, Extent, Segment, WorkerInfo

EXTENT_BYTES = 16
_PACKED = np.dtype(">i8")


def pack_extents(extents: ExtentArray) -> bytes:
    """[pages, 2] offsets and generations → 16 bytes a page, big-endian."""
    return extents.astype(_PACKED).tobytes()


def unpack_extents(packed: bytes) -> ExtentArray:
    return np.frombuffer(packed, _PACKED).astype(np.int64).reshape(-1, 2)


def pack_sizes(sizes: NDArray[np.int64]) -> bytes:
    return sizes.astype(_PACKED).tobytes()


def unpack_sizes(packed: bytes) -> NDArray[np.int64]:
    return np.frombuffer(packed, _PACKED).astype(np.int64)


def extent_array(extents: Sequence[Extent]) -> ExtentArray:
    return np.array([(e.offset, e.generation) for e in extents], np.int64).reshape(-1, 2)


def extent_list(extents: ExtentArray) -> list[Extent]:
    return [Extent(offset, generation) for offset, generation in extents.tolist()]


@dataclass(frozen=True, slots=True)
class StartedPut:
    """A put that was granted room and is not decided yet."""

    put_id: bytes
    namespace: bytes
    epoch: bytes
    worker: str
    page_bytes: int
    block_size: int
    keys: bytes
    """The wanted ones, packed."""
    left_s: float
    owner: int = 0


@dataclass(frozen=True, slots=True)
class Removal:
    """Pages of one segment that left the index."""

    id: int
    epoch: bytes
    extents: bytes
    page_bytes: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class OpenRemoval:
    """A removal that is not yet forgotten."""

    id: int
    epoch: bytes
    extents: bytes
    page_bytes: bytes
    freed: bool


@dataclass(frozen=True, slots=True)
class CommittedRun:
    """Pages of one put, in order."""

    namespace: bytes
    epoch: bytes
    page_bytes: int
    keys: bytes
    extents: bytes
    owner: int = 0
    """Who wrote them; 0: nobody in particular."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the meta server starts from."""

    segments: list[Segment]
    dead_epochs: list[bytes]
    runs: list[CommittedRun]
    pending: list[StartedPut]
    decided: dict[bytes, str]
    """put_id → state, oldest first."""
    removals: list[OpenRemoval]
    last_removal_id: int = 0
    rules: list[CacheRule] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of the KVCM API, safe to repeat."""

    sql: str
    arguments: tuple[object, ...]


@dataclass(slots=True)
class WriteBatch:
    """Changes that are written together, in the order of the fields."""

    segments: list[Segment] = field(default_factory=list)
    workers: list[WorkerInfo] = field(default_factory=list)
    starts: list[StartedPut] = field(default_factory=list)
    voids: list[bytes] = field(default_factory=list)
    ends: list[tuple[bytes, bytes]] = field(default_factory=list)
    """put_id, packed extents."""
    pages: list[tuple[bytes, CommittedRun]] = field(default_factory=list)
    """put_id and pages that a daemon has copied."""
    removals: list[Removal] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    """Removals whose pages the daemon has back."""
    rules: list[CacheRule] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(ops) for ops in (self.segments, self.workers, self.starts, self.voids, self.ends)) + sum(
            len(ops) for ops in (self.pages, self.removals, self.freed, self.rules, self.statements)
        )
