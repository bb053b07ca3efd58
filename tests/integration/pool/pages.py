"""A small layout, and puts of random pages in it."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass

import numpy as np

from stratakv.keys import KEY_BYTES, BlockKey, Namespace
from stratakv.layout import KVLayout
from stratakv.pool.dmp_client import DmpConnection
from stratakv.pool.pages import PageMemory, PageReader, PageWriter, RangeMemory, ReadPages
from stratakv.wire import PUT_ID_BYTES, Extent, Place

LAYOUT = KVLayout.for_attention(num_layers=3, num_kv_heads=1, head_dim=8, page_tokens=2, dtype="fp16", element_bytes=2)
NAMESPACE = Namespace(b"n" * 16)


def soon(timeout_s: float = 10.0) -> float:
    """A deadline that a healthy daemon keeps with ease."""
    return time.monotonic() + timeout_s


@dataclass(frozen=True)
class WrittenPages:
    """What a test wrote: `data[layer][page]` is (k, v)."""

    layout: KVLayout
    put_id: bytes
    keys: list[BlockKey]
    extents: list[Extent]
    data: list[list[tuple[bytes, ...]]]

    def places(self, node: str = "dmp-t") -> list[Place]:
        return [Place(node, e.offset, e.generation) for e in self.extents]


def random_layers(layout: KVLayout, num_pages: int, seed: int) -> list[list[tuple[bytes, ...]]]:
    source = random.Random(seed)
    return [
        [tuple(source.randbytes(r.size_bytes) for r in layer.ranges) for _ in range(num_pages)]
        for layer in layout.layers
    ]


def write_pages(
    connection: DmpConnection, num_pages: int, *, layout: KVLayout = LAYOUT, seed: int = 0, timeout_s: float = 60.0
) -> WrittenPages:
    """A whole put, except for what the meta server has to do with it."""
    put_id = os.urandom(PUT_ID_BYTES)
    keys = [BlockKey(os.urandom(KEY_BYTES)) for _ in range(num_pages)]
    data = random_layers(layout, num_pages, seed)
    extents = connection.allocate(put_id, num_pages, layout.page_bytes, timeout_s, deadline=soon())
    pages = PageWriter(layout, NAMESPACE).begin(connection, put_id, extents, keys)
    pages.write_layers(range(len(data)), memory_of(layout, data), deadline=soon())
    pages.write_headers(deadline=soon())
    return WrittenPages(layout, put_id, keys, extents, data)


def read_headers(connection: DmpConnection, written: WrittenPages, *, deadline: float | None = None) -> ReadPages:
    reader = PageReader(written.layout, NAMESPACE)
    return reader.read_headers(connection, written.places(), written.keys, deadline=deadline or soon())


def empty_memory(layout: KVLayout, num_pages: int) -> PageMemory:
    """Zeroed memory for every layer, its rows in no order."""
    sizes = [[r.size_bytes for r in layer.ranges] for layer in layout.layers]
    layers = [[RangeMemory(memoryview(bytearray(num_pages * size)), 0, size) for size in layer] for layer in sizes]
    return PageMemory(layers, np.array(random.Random(num_pages).sample(range(num_pages), num_pages), dtype=np.int64))


def memory_of(layout: KVLayout, data: list[list[tuple[bytes, ...]]]) -> PageMemory:
    """Memory that holds `data[layer][page]`."""
    memory = empty_memory(layout, len(data[0]))
    for ranges, pages in zip(memory.layers, data, strict=True):
        for row, parts in zip(memory.rows.tolist(), pages, strict=True):
            for (buffer, start, stride), part in zip(ranges, parts, strict=True):
                assert isinstance(buffer, memoryview)
                buffer[start + row * stride : start + row * stride + len(part)] = part
    return memory


def layer_data(memory: PageMemory, layer: int) -> list[tuple[bytes, ...]]:
    """What one layer of it holds, page by page."""
    return [
        tuple(bytes(m[start + row * stride : start + (row + 1) * stride]) for m, start, stride in memory.layers[layer])
        for row in memory.rows.tolist()
    ]
