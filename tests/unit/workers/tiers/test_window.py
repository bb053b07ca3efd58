"""Windows give and take the bytes of exactly their blocks, in host memory and through buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratakv import _native
from stratakv._native import Ended, LayerMove, RangeMove, make_gate
from workers.tiers.window import DeviceWindow, HostWindow, Window, windows_of

NUM_LAYERS, NUM_BLOCKS = 2, 5
SHAPE = (NUM_BLOCKS, 4, 1, 3)
BLOCK_BYTES = 4 * 3 * 4


@pytest.fixture
def l1() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    k, v = ([torch.randn(SHAPE, generator=generator) for _ in range(NUM_LAYERS)] for _ in range(2))
    return k, v


def moved(window: Window, layer: int, segment: bytearray, *, read: bool) -> int:
    """Move one layer of a window's blocks from or to pages that lie one after another."""
    ranges = tuple(RangeMove(*memory, BLOCK_BYTES) for memory in window.memory.layers[layer])
    rows = window.memory.rows
    offsets = np.arange(len(rows), dtype=np.int64) * 2 * BLOCK_BYTES
    checksums = np.zeros((1, len(rows)), dtype=np.uint64)
    if read:
        pages = (bytes(segment[at : at + 2 * BLOCK_BYTES]) for at in offsets.tolist())
        checksums[0] = [_native.moves.xxh3_64(page) for page in pages]
    gate = make_gate()
    if not read:
        gate.open(layer + 1)
    move = _native.moves.read_pages if read else _native.moves.write_pages
    how = move(segment, offsets, [LayerMove(layer, 0, ranges)], rows, checksums, gate, -1, float("inf"))
    return how[0]


@pytest.mark.parametrize("kind", [HostWindow, DeviceWindow])
def test_a_window_writes_and_reads_its_blocks_and_no_others(
    l1: tuple[list[torch.Tensor], list[torch.Tensor]], kind: type
) -> None:
    k, v = l1
    blocks = [3, 0, 4]
    source: Window = DeviceWindow(k, v, blocks) if kind is DeviceWindow else windows_of(k, v)(blocks)
    assert isinstance(source, kind)
    other_k, other_v = ([torch.zeros(SHAPE) for _ in range(NUM_LAYERS)] for _ in range(2))
    landing = [1, 2, 0]
    target: Window = (
        DeviceWindow(other_k, other_v, landing) if kind is DeviceWindow else windows_of(other_k, other_v)(landing)
    )
    for layer in range(NUM_LAYERS):
        segment = bytearray(len(blocks) * 2 * BLOCK_BYTES)
        source.fetch(layer)
        assert moved(source, layer, segment, read=False) == Ended.WHOLE
        assert moved(target, layer, segment, read=True) == Ended.WHOLE
        target.publish(layer)
        for one, other in ((k, other_k), (v, other_v)):
            assert torch.equal(other[layer][landing], one[layer][blocks])
            assert not other[layer][[3, 4]].any()
