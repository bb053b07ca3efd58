"""What `benchmarks.dmp` compares, each in a process of its own that is told what to do line by line on its input.

An arm holds one buffer of pages; `put` writes all of it to the other side, `get` fills it from there. A request is
{"do": "prepare", "page_bytes", "pages", "layers"} or {"do": "put" | "get" | …, "times"}; the answer to the latter is a list of
seconds.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import multiprocessing
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import msgspec
import numpy as np
import xxhash

from benchmarks import mooncake
from stratakv.keys import KEY_BYTES, BlockKey, Namespace
from stratakv.layout import KVLayout, LayerSpec, RangeSpec
from stratakv.pool.dmp_client import TransportKind, connect
from stratakv.pool.pages import PageMemory, PageReader, PageWriter, RangeMemory
from stratakv.wire import PUT_ID_BYTES, Place, Segment

DEADLINE_S = 60.0
PUT_TIMEOUT_S = 600.0
CALL_BYTES = 1024 * 1024
TOUCH_BYTES = 4 * 1024 * 1024
TOUCH_SHARE = 0.9
"""Beyond that Mooncake begins to evict."""
NAMESPACE = Namespace(bytes(16))
_ORDER = struct.Struct("<cQ")


class Arm:
    """The buffer that every arm has, and what it can do with it."""

    def prepare(self, page_bytes: int, pages: int, layers: int) -> None:
        """New bytes, put once, read once into an empty buffer and compared."""
        self.page_bytes, self.pages = page_bytes, pages
        self.total = page_bytes * pages
        self.map = mmap.mmap(-1, self.total)
        self.map.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(self.map)
        data = np.random.default_rng(self.total).bytes(self.total)
        self.buffer[:] = data
        self.begin(layers)
        self.put()
        self.buffer[:] = bytes(self.total)
        self.get()
        if self.buffer != data:
            raise SystemExit(f"{type(self).__name__}: other bytes came back than were put")

    def begin(self, layers: int) -> None:
        """Get ready for a buffer of another shape."""

    def end(self) -> None:
        """Leave the buffer."""

    def put(self) -> None:
        raise NotImplementedError

    def get(self) -> None:
        raise NotImplementedError

    def tidy(self) -> None:
        """After a put, outside the time that is taken."""


class Ours(Arm):
    """Pages of one range per layer, with headers and checksums, in a daemon of ours."""

    def __init__(self, kind: str, segment: str) -> None:
        self.connection = connect(
            msgspec.json.decode(segment, type=Segment), deadline=_soon(), force=TransportKind(kind)
        )

    def begin(self, layers: int) -> None:
        size = self.page_bytes // layers
        self.layout = KVLayout(16, "uint8", (LayerSpec((RangeSpec("kv", size),)),) * layers)
        # Layer-major, as an engine's cache is.
        memories = [self.buffer[at * self.pages * size : (at + 1) * self.pages * size] for at in range(layers)]
        rows = np.arange(self.pages, dtype=np.int64)
        self.memory = PageMemory([[RangeMemory(memory, 0, size)] for memory in memories], rows)
        self.put_id = os.urandom(PUT_ID_BYTES)
        self.keys = [BlockKey(os.urandom(KEY_BYTES)) for _ in range(self.pages)]
        self.writer, self.reader = PageWriter(self.layout, NAMESPACE), PageReader(self.layout, NAMESPACE)

    def put(self) -> None:
        # Asked again for the same put, the daemon grants the same room: memory for one batch is enough for any number.
        self.extents = self.connection.allocate(
            self.put_id, self.pages, self.layout.page_bytes, PUT_TIMEOUT_S, deadline=_soon()
        )
        writing = self.writer.begin(self.connection, self.put_id, self.extents, self.keys)
        writing.write(self.memory, deadline=_soon())

    def get(self) -> None:
        places = [Place(self.connection.segment.node, e.offset, e.generation) for e in self.extents]
        self.reader.read(self.connection, places, self.keys, self.memory, deadline=_soon())

    def in_place(self) -> None:
        """Verify the pages where they lie: what a reader does that needs no copy."""
        memory = self.connection.transport.mapping()
        assert memory is not None
        places = [Place(self.connection.segment.node, e.offset, e.generation) for e in self.extents]
        found = self.reader.read_headers(self.connection, places, self.keys, deadline=_soon())
        start = self.layout.layer_offsets()[0]
        for extent in self.extents:
            xxhash.xxh3_64_intdigest(memory[extent.offset + start : extent.offset + start + self.page_bytes])
        assert not found.failures


class Mooncake(Arm):
    """Objects of Mooncake Store, in a process of its own, by its batched calls on a registered buffer."""

    def __init__(self, segment_bytes: str) -> None:
        self.stack = ExitStack()
        self.store = mooncake.client(self.stack.enter_context(mooncake.running_store(int(segment_bytes))))
        self.puts = 0
        self._bring_in(int(segment_bytes))

    def _bring_in(self, segment_bytes: int) -> None:
        """Fill what the provider lends once, as our daemon touches its memory: nothing that is measured waits for the host's."""
        memory = mmap.mmap(-1, TOUCH_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        keys = [f"touch-{at}" for at in range(0, int(segment_bytes * TOUCH_SHARE), TOUCH_BYTES)]
        if self.store.register_buffer(address, TOUCH_BYTES) != 0:
            raise SystemExit("Mooncake did not register the buffer.")
        for key in keys:
            self.store.put_from(key, address, TOUCH_BYTES)
        for key in keys:
            self.store.remove(key, True)
        self.store.unregister_buffer(address)

    def begin(self, layers: int) -> None:
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        if self.store.register_buffer(self.address, self.total) != 0:
            raise SystemExit("Mooncake did not register the buffer.")
        self.addresses = [self.address + page * self.page_bytes for page in range(self.pages)]
        self.sizes = [self.page_bytes] * self.pages
        self.old: list[str] = []
        self.keys: list[str] = []

    def end(self) -> None:
        self.old, self.keys = self.old + self.keys, []
        self.tidy()
        self.store.unregister_buffer(self.address)

    def put(self) -> None:
        self.puts += 1
        self.old = self.keys
        self.keys = [f"{self.puts}-{page}" for page in range(self.pages)]
        if any(self.store.batch_put_from(self.keys, self.addresses, self.sizes)):
            raise SystemExit("Mooncake did not take the batch.")

    def get(self) -> None:
        if self.store.batch_get_into(self.keys, self.addresses, self.sizes) != self.sizes:
            raise SystemExit("Mooncake did not give the batch.")

    def tidy(self) -> None:
        for key in self.old:
            self.store.remove(key, True)
        self.old = []


class BareSocket(Arm):
    """The same bytes over one TCP connection to another process, as large calls, without any protocol or checksum."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        multiprocessing.get_context("spawn").Process(target=_peer, args=(port,), daemon=True).start()
        self.sock = listener.accept()[0]

    def put(self) -> None:
        self.sock.sendall(_ORDER.pack(b"p", self.total))
        self.sock.sendall(self.buffer)
        self.sock.recv(1)

    def get(self) -> None:
        self._get(b"g")

    def sendfile(self) -> None:
        """As `get`, the other end giving the kernel a file instead of bytes."""
        self._get(b"s")

    def _get(self, order: bytes) -> None:
        self.sock.sendall(_ORDER.pack(order, self.total))
        _fill(self.sock, self.buffer)


class MemoryCopy(Arm):
    """Page by page into other memory of the same process, with xxh3 from the library: what shared memory is held against."""

    def begin(self, layers: int) -> None:
        self.other = memoryview(mmap.mmap(-1, self.total))

    def put(self) -> None:
        self._copy(self.buffer, self.other)

    def get(self) -> None:
        self._copy(self.other, self.buffer)

    def _copy(self, source: memoryview, target: memoryview) -> None:
        for at in range(0, self.total, self.page_bytes):
            part = target[at : at + self.page_bytes]
            part[:] = source[at : at + self.page_bytes]
            xxhash.xxh3_64_intdigest(part)


def _soon() -> float:
    return time.monotonic() + DEADLINE_S


def _fill(sock: socket.socket, into: memoryview) -> None:
    at = 0
    while at < len(into):
        at += sock.recv_into(into[at : at + CALL_BYTES], 0, socket.MSG_WAITALL)


def _peer(port: int) -> None:
    """The other end of a BareSocket."""
    sock = socket.create_connection(("127.0.0.1", port))
    fd, memory = -1, memoryview(b"")
    while len(order := sock.recv(_ORDER.size, socket.MSG_WAITALL)) == _ORDER.size:
        what, total = _ORDER.unpack(order)
        if len(memory) != total:
            fd = os.memfd_create("peer")
            os.ftruncate(fd, total)
            memory = memoryview(mmap.mmap(fd, total))
        if what == b"p":
            _fill(sock, memory)
            sock.sendall(b"k")
        elif what == b"g":
            sock.sendall(memory)
        else:
            at = 0
            while at < total:
                at += os.sendfile(sock.fileno(), fd, at, total - at)


ARMS: dict[str, Callable[..., Arm]] = {
    "ours": Ours,
    "mooncake": Mooncake,
    "socket": BareSocket,
    "copy": MemoryCopy,
}


def serve() -> None:
    """Do what the lines on standard input say."""
    arm = ARMS[sys.argv[1]](*sys.argv[2:])
    is_prepared = False
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("do")
        seconds: list[float] = []
        if what == "prepare":
            if is_prepared:
                arm.end()
            arm.prepare(**order)
            is_prepared = True
        for _ in range(order.get("times", 0)):
            started = time.perf_counter()
            getattr(arm, what)()
            seconds.append(time.perf_counter() - started)
            arm.tidy()
        # Libraries write to standard output too, so answers are marked.
        os.write(1, b"\n>" + json.dumps(seconds).encode() + b"\n")
