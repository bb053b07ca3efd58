"""The moves in Python, for where the C++ module was not built; `base.Moves` says what each function does."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator, Sequence

import xxhash

from stratakv._native import base
from stratakv._native.base import Buffer, Ended, HeaderState, Int64s, LayerMove, RangeMove, UInt64s
from stratakv._native.grants import Grants
from stratakv.keys import KEY_BYTES, BlockKey, Namespace
from stratakv.layout import CorruptPage, PageHeader, packed_header_bytes

__all__ = [
    "KERNEL",
    "Gate",
    "Grants",
    "check_headers",
    "pack_headers",
    "read_pages",
    "use_kernel",
    "write_pages",
    "xxh3_64",
]

KERNEL = "xxhash"

STEP_BYTES = 1024 * 1024
"""The deadline and the watched socket are looked at after so many bytes."""
WAIT_S_MAX = 1e6


class Gate:
    """A counter with a condition."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open_layers = 0
        self._is_closed = False

    @property
    def open_layers(self) -> int:
        return self._open_layers

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def open(self, layers: int, /) -> None:
        with self._changed:
            self._open_layers = max(self._open_layers, layers)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def wait(self, layers: int, deadline: float, /) -> bool:
        with self._changed:
            left_s = min(max(0.0, deadline - time.monotonic()), WAIT_S_MAX)
            self._changed.wait_for(lambda: self._is_closed or self._open_layers >= layers, left_s)
            return self._open_layers >= layers


class _Watch:
    """Looks after the daemon's life and the deadline, every so many bytes."""

    def __init__(self, fd: int, deadline: float) -> None:
        self._deadline = deadline
        self._since = 0
        self._hangup = select.poll()
        if fd >= 0:
            self._hangup.register(fd, select.POLLRDHUP)

    def look(self) -> Ended:
        if time.monotonic() >= self._deadline:
            return Ended.LATE
        return Ended.GONE if self._hangup.poll(0) else Ended.WHOLE

    def passed(self, size_bytes: int) -> Ended:
        self._since += size_bytes
        if self._since < STEP_BYTES:
            return Ended.WHOLE
        self._since = 0
        return self.look()


def use_kernel(name: str, /) -> bool:
    return name == KERNEL


def xxh3_64(data: Buffer, seed: int = 0, /) -> int:
    return xxhash.xxh3_64_intdigest(data, seed)


def read_pages(
    segment: Buffer,
    page_offsets: Int64s,
    layers: Sequence[LayerMove],
    rows: Int64s,
    checksums: UInt64s,
    done: base.Gate,
    watch_fd: int,
    deadline: float,
    /,
) -> tuple[int, int, int]:
    memory = memoryview(segment)
    if not _is_within(len(memory), page_offsets, layers, rows):
        return Ended.OUT_OF_BOUNDS, 0, 0
    watch = _Watch(watch_fd, deadline)
    ended = watch.look()
    for index, layer in enumerate(layers):
        if ended:
            return ended, index, 0
        size = sum(r.size for r in layer.ranges)
        expected = checksums[index].tolist()
        for page, (offset, row) in enumerate(zip(page_offsets.tolist(), rows.tolist(), strict=True)):
            at, state = offset + layer.page_start, xxhash.xxh3_64()
            for part in _parts(layer.ranges, row):
                part[:] = memory[at : at + len(part)]
                state.update(part)
                at += len(part)
            if state.intdigest() != expected[page]:
                return Ended.DAMAGED, index, page
            ended = Ended.STOPPED if done.is_closed else watch.passed(size)
            if ended:
                return ended, index, page
        ended = watch.look()
        if not ended:
            done.open(layer.number + 1)
    return ended, len(layers), 0


def write_pages(
    segment: Buffer,
    page_offsets: Int64s,
    layers: Sequence[LayerMove],
    rows: Int64s,
    checksums: UInt64s,
    ready: base.Gate,
    watch_fd: int,
    deadline: float,
    /,
) -> tuple[int, int, int]:
    memory = memoryview(segment)
    if not _is_within(len(memory), page_offsets, layers, rows):
        return Ended.OUT_OF_BOUNDS, 0, 0
    watch = _Watch(watch_fd, deadline)
    for index, layer in enumerate(layers):
        if not ready.wait(layer.number + 1, deadline):
            return Ended.STOPPED if ready.is_closed else Ended.LATE, index, 0
        ended = watch.look()
        size = sum(r.size for r in layer.ranges)
        sums = []
        for page, (offset, row) in enumerate(zip(page_offsets.tolist(), rows.tolist(), strict=True)):
            if ended:
                return ended, index, page
            at, state = offset + layer.page_start, xxhash.xxh3_64()
            for part in _parts(layer.ranges, row):
                memory[at : at + len(part)] = part
                state.update(part)
                at += len(part)
            sums.append(state.intdigest())
            ended = watch.passed(size)
        checksums[index] = sums
        if ended:
            return ended, index, len(sums)
    return watch.look(), len(layers), 0


def _parts(ranges: Sequence[RangeMove], row: int) -> Iterator[memoryview]:
    for memory, start, stride, size in ranges:
        at = start + row * stride
        yield memoryview(memory)[at : at + size]


def _is_within(segment_bytes: int, page_offsets: Int64s, layers: Sequence[LayerMove], rows: Int64s) -> bool:
    if not len(rows):
        return True
    ends = [
        (int(rows[pick]) * r.stride + r.start, r)
        for layer in layers
        for r in layer.ranges
        for pick in (rows.argmin(), rows.argmax())
    ]
    first, last = int(page_offsets.min()), int(page_offsets.max())
    return (
        first >= 0
        and all(r.size >= 0 and 0 <= at <= memoryview(r.memory).nbytes - r.size for at, r in ends)
        and all(
            layer.page_start >= 0 and last + layer.page_start + sum(r.size for r in layer.ranges) <= segment_bytes
            for layer in layers
        )
    )


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
) -> bytes:
    states = []
    size = packed_header_bytes(num_layers)
    view = memoryview(memory)
    for page, (offset, generation) in enumerate(zip(offsets.tolist(), generations.tolist(), strict=True)):
        key = keys[page * KEY_BYTES : (page + 1) * KEY_BYTES]
        try:
            header = PageHeader.unpack(view[offset : offset + size] if offset >= 0 else b"")
        except CorruptPage:
            states.append(HeaderState.DAMAGED)
            continue
        if (header.namespace, header.key, header.generation) != (namespace, key, generation):
            states.append(HeaderState.OTHER_PAGE)
        elif (header.data_bytes, len(header.layer_checksums)) != (data_bytes, num_layers):
            states.append(HeaderState.OTHER_LAYOUT)
        else:
            states.append(HeaderState.GOOD)
            checksums[:, page] = header.layer_checksums
    return bytes(states)


def pack_headers(
    namespace: bytes,
    keys: bytes,
    generations: UInt64s,
    data_bytes: int,
    num_layers: int,
    checksums: UInt64s,
    /,
) -> bytes:
    if checksums.shape != (num_layers, len(generations)):
        raise ValueError("checksums must be [layer][page]")
    packed = [
        PageHeader(
            Namespace(namespace),
            BlockKey(keys[page * KEY_BYTES : (page + 1) * KEY_BYTES]),
            generation,
            data_bytes,
            tuple(checksums[:, page].tolist()),
        ).pack()
        for page, generation in enumerate(generations.tolist())
    ]
    return b"".join(packed)
