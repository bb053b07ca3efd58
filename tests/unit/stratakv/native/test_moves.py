"""Both implementations of the moves do the same to every byte, and nothing to bytes that are not theirs."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from stratakv import _native
from stratakv._native import Ended, HeaderState, LayerMove, Moves, RangeMove, fallback
from stratakv._native.base import Int64s, UInt64s
from stratakv.config import NATIVE_ENV
from stratakv.keys import KEY_BYTES, BlockKey, Namespace
from stratakv.layout import PageHeader, packed_header_bytes

NATIVE = _native.moves
IMPLEMENTATIONS = [
    pytest.param(fallback, id="python"),
    pytest.param(
        NATIVE, id="native", marks=pytest.mark.skipif(NATIVE is fallback, reason="the C++ module was not built")
    ),
]
either = pytest.mark.parametrize("moves", IMPLEMENTATIONS)
NAMESPACE = Namespace(b"n" * 16)
FAR = float("inf")
NO_WATCH = -1


@either
@settings(max_examples=300)
@given(size=st.one_of(st.integers(0, 300), st.integers(0, 20_000)), seed=st.integers(0, 2**64 - 1), fill=st.randoms())
def test_the_checksum_is_xxh3(moves: Moves, size: int, seed: int, fill: random.Random) -> None:
    data = fill.randbytes(size)
    assert moves.xxh3_64(data) == xxhash.xxh3_64_intdigest(data)
    assert moves.xxh3_64(data, seed) == xxhash.xxh3_64_intdigest(data, seed)


@pytest.mark.parametrize("kernel", ["scalar", "avx2", "avx512", "xxhash"])
def test_every_kernel_computes_xxh3_for_every_length_up_to_three_blocks(kernel: str) -> None:
    moves = fallback if kernel == fallback.KERNEL else NATIVE
    if not moves.use_kernel(kernel):
        pytest.skip(f"{kernel} cannot run here")
    data = random.Random(0).randbytes(3100)
    try:
        for size in range(len(data)):
            assert moves.xxh3_64(data[:size], size) == xxhash.xxh3_64_intdigest(data[:size], size), size
    finally:
        moves.use_kernel(moves.KERNEL)


def test_there_is_no_kernel_of_another_name() -> None:
    assert not NATIVE.use_kernel("abacus")
    assert not fallback.use_kernel("abacus")


@dataclass
class World:
    """A segment, an engine's memory, and what is moved between them."""

    segment: bytearray
    memories: list[bytearray]
    offsets: Int64s
    layers: list[LayerMove]
    rows: Int64s

    @property
    def checksums(self) -> UInt64s:
        return np.zeros((len(self.layers), len(self.rows)), dtype=np.uint64)

    def segment_part(self, layer: LayerMove, page: int) -> slice:
        start = int(self.offsets[page]) + layer.page_start
        return slice(start, start + sum(r.size for r in layer.ranges))

    def engine_parts(self, layer: LayerMove, page: int) -> list[bytes]:
        row = int(self.rows[page])
        return [bytes(r.memory)[r.start + row * r.stride :][: r.size] for r in layer.ranges]


def world(rng: random.Random) -> World:
    """Ranges of odd sizes and strides, pages and rows in any order."""
    num_pages, num_rows = rng.randrange(6), rng.randrange(6, 9)
    layers, memories, at = [], [], rng.randrange(50)
    for number in range(rng.randrange(1, 4)):
        ranges = []
        page_start = at
        for _ in range(rng.randrange(1, 4)):
            size = rng.choice([1, 63, 64, 65, rng.randrange(300), rng.randrange(5000), 1024])
            start, stride = rng.randrange(20), size + rng.choice([0, 0, 7])
            memories.append(bytearray(rng.randbytes(start + num_rows * stride)))
            ranges.append(RangeMove(memoryview(memories[-1]), start, stride, size))
            at += size
        layers.append(LayerMove(number, page_start, tuple(ranges)))
    page_bytes = at + rng.randrange(100)
    places = rng.sample(range(8), num_pages)
    return World(
        bytearray(rng.randbytes(8 * page_bytes)),
        memories,
        np.array(places, dtype=np.int64) * page_bytes,
        layers,
        np.array(rng.sample(range(num_rows), num_pages), dtype=np.int64),
    )


def open_gate(moves: Moves) -> _native.Gate:
    gate = moves.Gate()
    gate.open(1000)
    return gate


@either
@settings(max_examples=150)
@given(rng=st.randoms(use_true_random=False))
def test_pages_are_written_and_read_to_the_byte_and_nothing_else_is(moves: Moves, rng: random.Random) -> None:
    it = world(rng)
    before, checksums = bytearray(it.segment), it.checksums
    how = moves.write_pages(it.segment, it.offsets, it.layers, it.rows, checksums, open_gate(moves), NO_WATCH, FAR)
    assert how[0] == Ended.WHOLE
    for index, layer in enumerate(it.layers):
        for page in range(len(it.rows)):
            parts = b"".join(it.engine_parts(layer, page))
            assert it.segment[it.segment_part(layer, page)] == parts
            assert int(checksums[index, page]) == xxhash.xxh3_64_intdigest(parts)
            before[it.segment_part(layer, page)] = parts
    assert it.segment == before

    wanted = [bytearray(memory) for memory in it.memories]
    for layer in it.layers:
        for r in layer.ranges:
            for row in it.rows.tolist():
                start = r.start + row * r.stride
                assert isinstance(r.memory, memoryview)
                r.memory[start : start + r.size] = bytes(r.size)
    done = moves.Gate()
    how = moves.read_pages(it.segment, it.offsets, it.layers, it.rows, checksums, done, NO_WATCH, FAR)
    assert how[0] == Ended.WHOLE
    assert done.open_layers == len(it.layers)
    assert it.memories == wanted


@either
@settings(max_examples=100)
@given(rng=st.randoms(use_true_random=False))
def test_a_flipped_bit_is_found_and_its_layer_never_let_through(moves: Moves, rng: random.Random) -> None:
    it = world(rng)
    checksums = it.checksums
    moves.write_pages(it.segment, it.offsets, it.layers, it.rows, checksums, open_gate(moves), NO_WATCH, FAR)
    spots = [
        (index, page, at)
        for index, layer in enumerate(it.layers)
        for page in range(len(it.rows))
        for at in range(*it.segment_part(layer, page).indices(len(it.segment)))
    ]
    if not spots:
        return
    index, page, at = rng.choice(spots)
    it.segment[at] ^= 1 << rng.randrange(8)
    done = moves.Gate()
    how = moves.read_pages(it.segment, it.offsets, it.layers, it.rows, checksums, done, NO_WATCH, FAR)
    assert how == (Ended.DAMAGED, index, page)
    assert done.open_layers == index


@either
@pytest.mark.parametrize(
    ("offset", "row", "start", "stride"),
    [(-1, 0, 0, 8), (57, 0, 0, 8), (2**62, 0, 0, 8), (0, -1, 0, 8), (0, 8, 0, 8), (0, 0, 57, 8), (0, 2**40, 0, 2**40)],
)
def test_nothing_is_moved_where_anything_lies_outside(
    moves: Moves, offset: int, row: int, start: int, stride: int
) -> None:
    segment, memory = bytearray(b"s" * 64), bytearray(b"m" * 64)
    layers = [LayerMove(0, 0, (RangeMove(memoryview(memory), start, stride, 8),))]
    offsets, rows = np.array([0, offset], dtype=np.int64), np.array([0, row], dtype=np.int64)
    checksums = np.zeros((1, 2), dtype=np.uint64)
    for move in (moves.read_pages, moves.write_pages):
        how = move(segment, offsets, layers, rows, checksums, open_gate(moves), NO_WATCH, FAR)
        assert how[0] == Ended.OUT_OF_BOUNDS
    assert bytes(segment + memory) == b"s" * 64 + b"m" * 64


@either
def test_a_move_ends_by_its_deadline_when_its_gate_is_closed_and_when_the_other_end_is_gone(moves: Moves) -> None:
    segment, memory = bytearray(64), bytearray(64)
    layers = [LayerMove(0, 0, (RangeMove(memoryview(memory), 0, 8, 8),))]
    one, checksums = np.zeros(1, dtype=np.int64), np.zeros((1, 1), dtype=np.uint64)
    checksums[0] = xxhash.xxh3_64_intdigest(bytes(8))

    def ended(move: str, gate: _native.Gate, fd: int, deadline: float) -> int:
        return int(getattr(moves, move)(segment, one, layers, one, checksums, gate, fd, deadline)[0])

    closed = moves.Gate()
    closed.close()
    near, far = socket.socketpair()
    with near, far:
        assert ended("read_pages", moves.Gate(), near.fileno(), FAR) == Ended.WHOLE
        assert ended("write_pages", open_gate(moves), near.fileno(), FAR) == Ended.WHOLE
        assert ended("read_pages", closed, near.fileno(), FAR) == Ended.STOPPED
        assert ended("write_pages", closed, near.fileno(), FAR) == Ended.STOPPED
        assert ended("read_pages", moves.Gate(), near.fileno(), time.monotonic()) == Ended.LATE
        assert ended("write_pages", moves.Gate(), near.fileno(), time.monotonic() + 0.01) == Ended.LATE
        far.close()
        assert ended("read_pages", moves.Gate(), near.fileno(), FAR) == Ended.GONE
        assert ended("write_pages", open_gate(moves), near.fileno(), FAR) == Ended.GONE


@either
def test_a_writer_takes_each_layer_only_when_it_is_let_through(moves: Moves) -> None:
    memory, segment = bytearray(24), bytearray(24)
    layers = [LayerMove(n, 8 * n, (RangeMove(memoryview(memory), 8 * n, 0, 8),)) for n in range(3)]
    one, checksums = np.zeros(1, dtype=np.int64), np.zeros((3, 1), dtype=np.uint64)
    ready = moves.Gate()
    how: list[tuple[int, int, int]] = []
    args = (segment, one, layers, one, checksums, ready, NO_WATCH, time.monotonic() + 20)
    writer = threading.Thread(target=lambda: how.append(moves.write_pages(*args)))
    writer.start()
    for layer in range(3):
        assert segment[8 * layer :] == bytes(24 - 8 * layer)
        memory[8 * layer : 8 * layer + 8] = bytes([layer + 1]) * 8
        ready.open(layer + 1)
    writer.join()
    assert how[0][0] == Ended.WHOLE
    assert segment == memory


@either
def test_a_gate_opens_but_never_shuts_what_is_open(moves: Moves) -> None:
    gate = moves.Gate()
    assert not gate.wait(1, time.monotonic())
    gate.open(3)
    gate.open(2)
    assert (gate.open_layers, gate.is_closed) == (3, False)
    waiting = threading.Thread(target=lambda: gate.wait(4, FAR))
    waiting.start()
    gate.close()
    waiting.join(20)
    assert not waiting.is_alive()
    assert gate.wait(3, 0.0)
    assert not gate.wait(4, FAR)
    assert gate.is_closed


@either
@settings(max_examples=60)
@given(rng=st.randoms(use_true_random=False), num_layers=st.integers(1, 40), num_pages=st.integers(0, 5))
def test_headers_are_those_of_the_layout(moves: Moves, rng: random.Random, num_layers: int, num_pages: int) -> None:
    keys = [BlockKey(rng.randbytes(KEY_BYTES)) for _ in range(num_pages)]
    generations = np.array([rng.getrandbits(64) for _ in keys], dtype=np.uint64)
    sums = np.array([[rng.getrandbits(64) for _ in keys] for _ in range(num_layers)], dtype=np.uint64)
    sums = sums.reshape(num_layers, num_pages)
    packed = moves.pack_headers(NAMESPACE, b"".join(keys), generations, 12345, num_layers, sums)
    size = packed_header_bytes(num_layers)
    assert [packed[at : at + size] for at in range(0, len(packed), size)] == [
        PageHeader(NAMESPACE, key, int(generation), 12345, tuple(sums[:, page].tolist())).pack()
        for page, (key, generation) in enumerate(zip(keys, generations, strict=True))
    ]
    found = np.zeros_like(sums)
    offsets = np.arange(num_pages, dtype=np.int64) * size
    states = moves.check_headers(packed, offsets, NAMESPACE, b"".join(keys), generations, 12345, num_layers, found)
    assert states == bytes(num_pages)
    assert (found == sums).all()


@either
def test_every_flipped_bit_of_a_header_is_found_and_other_pages_are_told_apart(moves: Moves) -> None:
    key, generation = os.urandom(KEY_BYTES), np.array([7], dtype=np.uint64)
    sums, start = np.array([[1], [2]], dtype=np.uint64), np.zeros(1, dtype=np.int64)
    packed = moves.pack_headers(NAMESPACE, key, generation, 99, 2, sums)

    def state(
        raw: bytes = packed,
        namespace: bytes = NAMESPACE,
        wanted_key: bytes = key,
        age: int = 7,
        data_bytes: int = 99,
        at: int = 0,
    ) -> int:
        ages = np.array([age], dtype=np.uint64)
        found = np.zeros_like(sums)
        return moves.check_headers(raw, start + at, namespace, wanted_key, ages, data_bytes, 2, found)[0]

    assert state() == HeaderState.GOOD
    assert state(namespace=b"m" * 16) == HeaderState.OTHER_PAGE
    assert state(wanted_key=bytes(KEY_BYTES)) == HeaderState.OTHER_PAGE
    assert state(age=8) == HeaderState.OTHER_PAGE
    assert state(data_bytes=98) == HeaderState.OTHER_LAYOUT
    for at in (-1, 1, len(packed), 2**40):
        assert state(at=at) == HeaderState.DAMAGED
    for bit in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        assert state(raw=bytes(flipped)) == HeaderState.DAMAGED, bit


def test_a_switch_chooses_python() -> None:
    code = "from stratakv import _native; print(_native.moves.KERNEL)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, NATIVE_ENV: "0"}, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == fallback.KERNEL
