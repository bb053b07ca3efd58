"""KV of every shape comes back bit-identical (P1): ranks of tensor parallelism, MLA, fp8 with scales, hybrid models."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from stratakv.keys import KEY_BYTES, BlockKey
from stratakv.layout import ALIGNMENT_BYTES, KVLayout, LayerSpec, RangeSpec
from stratakv.pool.dmp_client import DmpConnection, TransportKind, connect
from stratakv.pool.errors import PageError
from stratakv.pool.pages import PageMemory, PageReader, PageWriter, RangeMemory
from stratakv.wire import PUT_ID_BYTES, Place
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import (
    NAMESPACE,
    WrittenPages,
    empty_memory,
    layer_data,
    read_headers,
    soon,
    write_pages,
)

pytestmark = pytest.mark.usefixtures("moves")
TOKENS = 16
HEADS = 4
HEAD_DIM = 16
LAYERS = 3
PAGES = 3


def layer(**sizes: int) -> LayerSpec:
    return LayerSpec(tuple(RangeSpec(name, size) for name, size in sizes.items()))


def attention(page_tokens: int, heads: int, element_bytes: int = 2) -> LayerSpec:
    size = page_tokens * heads * HEAD_DIM * element_bytes
    return layer(k=size, v=size)


def rank_of_two(rank: int) -> KVLayout:
    return KVLayout(TOKENS, "bf16", (attention(TOKENS, HEADS // 2),) * LAYERS, tp_rank=rank)


MLA = KVLayout(TOKENS, "bf16", (layer(latent=TOKENS * (64 + 8) * 2),) * LAYERS)
FP8 = KVLayout(
    TOKENS,
    "fp8_e4m3",
    (
        layer(
            k=TOKENS * HEADS * HEAD_DIM,
            k_scale=TOKENS * HEADS * 4,
            v=TOKENS * HEADS * HEAD_DIM,
            v_scale=TOKENS * HEADS * 4,
        ),
    )
    * LAYERS,
)
FULL = KVLayout(4 * TOKENS, "bf16", (attention(4 * TOKENS, 1), attention(4 * TOKENS, HEADS)), group=0)
"""Layers of unequal size, in pages of four blocks."""
SLIDING = KVLayout(TOKENS, "bf16", (attention(TOKENS, 2),) * 5, group=1)
LAYOUTS = {
    "tensor parallel, rank 0": rank_of_two(0),
    "tensor parallel, rank 1": rank_of_two(1),
    "mla": MLA,
    "fp8 with scales": FP8,
    "hybrid, full attention": FULL,
    "hybrid, sliding window": SLIDING,
}


def read_all(connection: DmpConnection, written: WrittenPages) -> list[list[tuple[bytes, ...]]]:
    memory = empty_memory(written.layout, len(written.keys))
    layers = range(len(written.layout.layers))
    read_headers(connection, written).read_layers(layers, memory, deadline=soon())
    return [layer_data(memory, layer) for layer in layers]


@pytest.mark.parametrize("reader_kind", [TransportKind.SHM, TransportKind.TCP])
def test_pages_of_every_layout_lie_in_one_segment_and_come_back(
    daemon: DaemonProcess, connection: DmpConnection, reader_kind: TransportKind
) -> None:
    # Twice each, so that every layout has another one's pages on both sides.
    written = [
        write_pages(connection, PAGES, layout=layout, seed=seed)
        for seed, layout in enumerate([*LAYOUTS.values(), *LAYOUTS.values()])
    ]
    taken = sorted((e.offset, e.offset + w.layout.page_bytes) for w in written for e in w.extents)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    assert all(start % ALIGNMENT_BYTES == 0 for start, _ in taken)
    reader = connect(daemon.segment, deadline=soon(), force=reader_kind)
    for pages in written:
        assert read_all(reader, pages) == pages.data
    reader.close()


def test_specs_of_one_model_never_share_pages() -> None:
    digests = [layout.digest() for layout in LAYOUTS.values()]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("other", [name for name in LAYOUTS if not name.startswith("tensor")])
def test_a_page_is_not_read_by_another_layout(connection: DmpConnection, other: str) -> None:
    written = write_pages(connection, 1, layout=rank_of_two(0))
    reader = PageReader(LAYOUTS[other], NAMESPACE)
    failures = reader.read_headers(connection, written.places(), written.keys, deadline=soon()).failures
    assert isinstance(failures[0], PageError)


Array = NDArray[np.uint16]


class Rank:
    """One rank of two: its half of the heads, in a paged cache [blocks, tokens, heads, dim] for k and v of each layer."""

    def __init__(self, rank: int, num_blocks: int) -> None:
        self.layout = rank_of_two(rank)
        shape = (num_blocks, TOKENS, HEADS // 2, HEAD_DIM)
        self.cache = [tuple(np.zeros(shape, np.uint16) for _ in "kv") for _ in range(LAYERS)]

    def memory(self, rows: Sequence[int]) -> PageMemory:
        layers = [
            [RangeMemory(memoryview(part).cast("B"), 0, part[0].nbytes) for part in parts]  # type: ignore[arg-type]
            for parts in self.cache
        ]
        return PageMemory(layers, np.array(rows, dtype=np.int64))


def test_the_ranks_of_a_model_give_back_the_heads_they_were_given(
    daemon: DaemonProcess, connection: DmpConnection
) -> None:
    source = np.random.default_rng(7)
    whole: Array = source.integers(0, 1 << 16, (LAYERS, 2, PAGES, TOKENS, HEADS, HEAD_DIM), np.uint16)
    keys = [BlockKey(os.urandom(KEY_BYTES)) for _ in range(PAGES)]
    written_to, read_to = [2, 0, 1], [4, 0, 2]
    parts = []
    for number in range(2):
        heads = slice(number * HEADS // 2, (number + 1) * HEADS // 2)
        writer = Rank(number, PAGES)
        for at, ranges in enumerate(writer.cache):
            for which, cache in enumerate(ranges):
                cache[written_to] = whole[at, which, :, :, heads]
        put_id = os.urandom(PUT_ID_BYTES)
        extents = connection.allocate(put_id, PAGES, writer.layout.page_bytes, 60.0, deadline=soon())
        pages = PageWriter(writer.layout, NAMESPACE).begin(connection, put_id, extents, keys)
        pages.write_layers(range(LAYERS), writer.memory(written_to), deadline=soon())
        pages.write_headers(deadline=soon())

        reader = Rank(number, PAGES + 2)
        places = [Place("dmp-t", e.offset, e.generation) for e in extents]
        found = PageReader(reader.layout, NAMESPACE).read_headers(connection, places, keys, deadline=soon())
        found.read_layers(range(LAYERS), reader.memory(read_to), deadline=soon())
        parts.append(np.array([[cache[read_to] for cache in ranges] for ranges in reader.cache]))
    assert np.array_equal(np.concatenate(parts, axis=-2), whole)
