"""What both implementations of the moves do: `_moves` (C++, without the interpreter lock) and `fallback` (Python)."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Buffer = bytes | bytearray | memoryview
Int64s = npt.NDArray[np.int64]
UInt32s = npt.NDArray[np.uint32]
UInt64s = npt.NDArray[np.uint64]


class Ended(enum.IntEnum):
    """How a batch ended."""

    WHOLE = 0
    DAMAGED = 1
    """That layer of that page does not match its checksum."""
    OUT_OF_BOUNDS = 2
    """A page or a row lies outside its memory; nothing was moved."""
    LATE = 3
    STOPPED = 4
    """The gate was closed."""
    GONE = 5
    """The watched socket was hung up, or the one that carries the bytes."""
    ANSWERED = 6
    """The other end sent another frame than the one that was due."""
    HEADER = 7
    """That page's header is not the one that was due; in place of the layer stands a `HeaderState`."""


class HeaderState(enum.IntEnum):
    """What lies where a page's header should be."""

    GOOD = 0
    DAMAGED = 1
    OTHER_PAGE = 2
    """A whole header of another namespace, key or generation."""
    OTHER_LAYOUT = 3


class RangeMove(NamedTuple):
    """One range of a layer in the caller's memory: that of row `n` is `size` bytes at `start + n * stride`."""

    memory: Buffer
    start: int
    stride: int
    size: int


class LayerMove(NamedTuple):
    """One layer: its number, where it begins in a page, and its ranges, which follow each other there."""

    number: int
    page_start: int
    ranges: tuple[RangeMove, ...]


class PageHeaders(NamedTuple):
    """What the headers of some pages say besides the checksums; `keys` are packed."""

    namespace: bytes
    keys: bytes
    generations: UInt64s
    data_bytes: int
    num_layers: int


class Gate(Protocol):
    """How many layers are through: opened by one thread, waited for by another."""

    @property
    def open_layers(self) -> int:
        """Layers below this number may pass."""

    @property
    def is_closed(self) -> bool:
        """Whether no more will open."""

    def open(self, layers: int, /) -> None:
        """Let layers below `layers` pass; what is open stays open."""

    def close(self) -> None:
        """Open no more; everybody who waits returns."""

    def wait(self, layers: int, deadline: float, /) -> bool:
        """Whether layers below `layers` may pass, as soon as they may, at the latest by the deadline."""


_Gate = Gate
"""In `Moves` the name `Gate` means the class that makes one."""


class Entered(enum.IntEnum):
    """Whether a write may begin."""

    YES = 0
    REFUSED = 1
    """The put is unknown, over or out of time."""
    OUTSIDE = 2
    """A range lies outside the pages of its put."""


class Grants(Protocol):
    """Which ranges of a segment each unfinished put may be written to; thread-safe."""

    def open(self, put_id: bytes, starts: UInt64s, ends: UInt64s, deadline: float, /) -> None:
        """Let these runs of bytes, ascending and apart, be written until the deadline."""

    def close(self, put_id: bytes, /) -> bool:
        """Let no write begin any more. Returns whether none is running either."""

    def enter(self, put_id: bytes, offsets: UInt64s, sizes: UInt32s, now: float, /) -> int:
        """An `Entered`: whether these ranges may be written now. If they may, `leave` follows."""

    def leave(self, put_id: bytes, /) -> None:
        """A write that was let in is over."""


_Grants = Grants


class Moves(Protocol):
    """The functions of either module. Memory is contiguous; deadlines are readings of `time.monotonic`."""

    @property
    def KERNEL(self) -> str:  # noqa: N802
        """What computes the checksums here."""

    @property
    def Gate(self) -> type[_Gate]:  # noqa: N802
        """Makes a gate; only that of the same module can be given to the functions below."""

    @property
    def Grants(self) -> type[_Grants]:  # noqa: N802
        """Makes a table of grants; only that of the same module can be given to the functions below."""

    def use_kernel(self, name: str, /) -> bool:
        """Compute checksums by that one from here on; False where this processor or module has it not."""

    def xxh3_64(self, data: Buffer, seed: int = 0, /) -> int:
        """XXH3-64 of the bytes."""

    def read_pages(
        self,
        segment: Buffer,
        page_offsets: Int64s,
        layers: Sequence[LayerMove],
        rows: Int64s,
        checksums: UInt64s,
        done: _Gate,
        watch_fd: int,
        deadline: float,
        /,
    ) -> tuple[int, int, int]:
        """Copy layers of the pages at `page_offsets` to `rows` of the caller's memory, and check what was copied.

        `checksums` is [layer][page]. `done` opens behind each layer that is there and verified; closing it stops the batch,
        and so does a hang-up of `watch_fd` (if that is not negative). Returns (an `Ended`, index of the layer, index of the
        page) where it ended.
        """

    def write_pages(
        self,
        segment: Buffer,
        page_offsets: Int64s,
        layers: Sequence[LayerMove],
        rows: Int64s,
        checksums: UInt64s,
        ready: _Gate,
        watch_fd: int,
        deadline: float,
        /,
    ) -> tuple[int, int, int]:
        """The other way, each layer as soon as `ready` lets it pass; `checksums` [layer][page] is filled."""

    def check_headers(
        self,
        memory: Buffer,
        offsets: Int64s,
        namespace: bytes,
        keys: bytes,
        generations: UInt64s,
        data_bytes: int,
        num_layers: int,
        checksums: UInt64s,
        /,
    ) -> bytes:
        """Check the headers at `offsets` of memory that may be changing; `keys` are packed.

        Returns a `HeaderState` per page; `checksums` [layer][page] is filled for the good ones.
        """

    def pack_headers(
        self,
        namespace: bytes,
        keys: bytes,
        generations: UInt64s,
        data_bytes: int,
        num_layers: int,
        checksums: UInt64s,
        /,
    ) -> bytes:
        """The headers of pages with these keys (packed), generations and checksums [layer][page], one after another."""


class Wire(Protocol):
    """Moves over blocking sockets that speak the pool protocol: only the C++ module has them.

    Each socket carries a share of the pages, on a thread of its own. When one fails, all of them are shut down.
    """

    def exchange_frames(
        self, fd: int, frame: bytes, reply_bytes_max: int, deadline: float, /
    ) -> tuple[int, bytes, bytes]:
        """Send a control request. Returns (an `Ended`, header, body) of what comes; no body if it is no reply, or too long."""

    def fetch_pages(
        self,
        sockets: tuple[int, ...],
        opening: bytes,
        frame_bytes: int,
        frame_ranges: int,
        page_offsets: Int64s,
        layers: Sequence[LayerMove],
        rows: Int64s,
        checksums: UInt64s,
        done: _Gate,
        deadline: float,
        headers: PageHeaders | None,
        /,
    ) -> tuple[int, int, int, bytes]:
        """As `read_pages`, from the daemon at the other end.

        `opening` is how frames begin, `frame_bytes` and `frame_ranges` are what one carries at most. The fourth value is the
        frame that came instead of data, if one did: header and body. With `headers`, those of the pages come along: all layers must
        be asked for, each page's header is checked, and `checksums` is filled from it.
        """

    def push_pages(
        self,
        sockets: tuple[int, ...],
        opening: bytes,
        frame_bytes: int,
        frame_ranges: int,
        put_id: bytes,
        thanks: bytes,
        page_offsets: Int64s,
        layers: Sequence[LayerMove],
        rows: Int64s,
        checksums: UInt64s,
        ready: _Gate,
        deadline: float,
        headers: PageHeaders | None,
        /,
    ) -> tuple[int, int, int, bytes]:
        """As `write_pages`; every frame is answered with `thanks`, or was refused.

        With `headers`, those of the pages are made and sent behind all layers.
        """

    def serve_frames(
        self,
        fd: int,
        segment: memoryview,
        grants: _Grants,
        opening: bytes,
        done: bytes,
        limits: tuple[int, int, int],
        idle_s: float,
        frame_s: float,
        traffic: Int64s,
        /,
    ) -> tuple[int, bytes, bytes]:
        """Answer what a client reads from the segment and writes to it, until it sends anything else.

        `done` is the frame that answers a write; `limits` are the bytes of a control request, and the ranges and bytes of a
        transfer; `idle_s` is how long a client may be silent (negative: for ever), `frame_s` how long one frame may take;
        `traffic` is [3][3]: ranges, bytes and nanoseconds of what was read, then of what was written.

        Returns (an `Ended`, header, body) of a frame that nothing has been done about: its payload is still to come, and also its
        body if its header is not one of this protocol. No header: the client has left.
        """
