"""The C++ module; `base.Moves` says what each function does."""

from collections.abc import Sequence

from stratakv._native.base import Buffer, Int64s, LayerMove, PageHeaders, UInt32s, UInt64s

INTERFACE: int
KERNEL: str

class Gate:
    @property
    def open_layers(self) -> int: ...
    @property
    def is_closed(self) -> bool: ...
    def open(self, layers: int, /) -> None: ...
    def close(self) -> None: ...
    def wait(self, layers: int, deadline: float, /) -> bool: ...

class Grants:
    def open(self, put_id: bytes, starts: UInt64s, ends: UInt64s, deadline: float, /) -> None: ...
    def close(self, put_id: bytes, /) -> bool: ...
    def enter(self, put_id: bytes, offsets: UInt64s, sizes: UInt32s, now: float, /) -> int: ...
    def leave(self, put_id: bytes, /) -> None: ...

class MessageWalker:
    at_boundary: bool
    last_kind: int
    transaction_status: int
    was_idle: bool
    def __new__(cls, watched: bytes, violation: type[Exception], /) -> MessageWalker: ...
    def feed(self, data: Buffer, /) -> Sequence[int]: ...

class KeyTable:
    def __new__(cls, row_words: int, first_word: int, num_words: int, /) -> KeyTable: ...
    def __len__(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    def find(self, wanted: Buffer | UInt64s, rows: UInt64s, found: Int64s, /) -> None: ...
    def enter(self, numbers: Int64s, rows: UInt64s, /) -> bytes: ...
    def leave(self, numbers: Int64s, rows: UInt64s, /) -> None: ...

def use_kernel(name: str, /) -> bool: ...
def xxh3_64(data: Buffer, seed: int = 0, /) -> int: ...
def read_pages(
    segment: Buffer,
    page_offsets: Int64s,
    layers: Sequence[LayerMove],
    rows: Int64s,
    checksums: UInt64s,
    done: Gate,
    watch_fd: int,
    deadline: float,
    /,
) -> tuple[int, int, int]: ...
def write_pages(
    segment: Buffer,
    page_offsets: Int64s,
    layers: Sequence[LayerMove],
    rows: Int64s,
    checksums: UInt64s,
    ready: Gate,
    watch_fd: int,
    deadline: float,
    /,
) -> tuple[int, int, int]: ...
def check_headers(
    memory: Buffer,
    offsets: Int64s,
    namespace: bytes,
    keys: bytes,
    generations: UInt64s,
    data_bytes: int,
    num_layers: int,
    checksums: UInt64s,
    /,
) -> bytes: ...
def pack_headers(
    namespace: bytes,
    keys: bytes,
    generations: UInt64s,
    data_bytes: int,
    num_layers: int,
    checksums: UInt64s,
    /,
) -> bytes: ...
def exchange_frames(fd: int, frame: bytes, reply_bytes_max: int, deadline: float, /) -> tuple[int, bytes, bytes]: ...
def fetch_pages(
    sockets: tuple[int, ...],
    opening: bytes,
    frame_bytes: int,
    frame_ranges: int,
    page_offsets: Int64s,
    layers: Sequence[LayerMove],
    rows: Int64s,
    checksums: UInt64s,
    done: Gate,
    deadline: float,
    headers: PageHeaders | None,
    /,
) -> tuple[int, int, int, bytes]: ...
def push_pages(
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
    ready: Gate,
    deadline: float,
    headers: PageHeaders | None,
    /,
) -> tuple[int, int, int, bytes]: ...
def serve_frames(
    fd: int,
    segment: memoryview,
    grants: Grants,
    opening: bytes,
    done: bytes,
    limits: tuple[int, int, int],
    idle_s: float,
    frame_s: float,
    traffic: Int64s,
    /,
) -> tuple[int, bytes, bytes]: ...
