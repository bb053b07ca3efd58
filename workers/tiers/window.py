"""The door between L1's tensors and bytes that transports can move.

A window is a set of L1 blocks. On the CPU its parts are the blocks themselves, so that bytes move once; on a CUDA device they
are pinned buffers, copied to and from the blocks one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

Parts = list[tuple[memoryview, memoryview]]
"""Per block of a window: its k and its v of one layer, as bytes."""


class Window(Protocol):
    """Some blocks of L1, layer by layer."""

    def parts(self, layer: int) -> Parts:
        """Where one layer of each block lies in host memory."""

    def fetch(self, layer: int) -> None:
        """Before reading parts: make them equal L1."""

    def publish(self, layer: int) -> None:
        """After writing parts: make L1 equal them."""


def _parts(k: torch.Tensor, v: torch.Tensor, rows: Sequence[int]) -> Parts:
    k_bytes, v_bytes = (t.view(torch.uint8).reshape(-1).numpy().data for t in (k, v))
    size = len(k_bytes) // k.shape[0]
    return [(k_bytes[row * size : (row + 1) * size], v_bytes[row * size : (row + 1) * size]) for row in rows]


class HostWindow:
    """Blocks of an L1 in host memory, in place."""

    def __init__(self, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], blocks: Sequence[int]) -> None:
        self._k, self._v, self._blocks = k, v, blocks

    def parts(self, layer: int) -> Parts:
        return _parts(self._k[layer], self._v[layer], self._blocks)

    def fetch(self, layer: int) -> None:
        """The parts are L1."""

    def publish(self, layer: int) -> None:
        """The parts are L1."""


class DeviceWindow:
    """Blocks of an L1 in device memory, through pinned host buffers."""

    def __init__(self, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], blocks: Sequence[int]) -> None:
        self._device = (k, v)
        shape = (len(blocks), *k[0].shape[1:])
        pin = k[0].device.type == "cuda"
        self._host = tuple([torch.empty(shape, dtype=k[0].dtype, pin_memory=pin) for _ in k] for _ in range(2))
        self._blocks = torch.tensor(list(blocks), device=k[0].device)

    def parts(self, layer: int) -> Parts:
        return _parts(self._host[0][layer], self._host[1][layer], range(len(self._blocks)))

    def fetch(self, layer: int) -> None:
        for host, device in zip(self._host, self._device, strict=True):
            host[layer].copy_(device[layer].index_select(0, self._blocks))

    def publish(self, layer: int) -> None:
        for host, device in zip(self._host, self._device, strict=True):
            device[layer].index_copy_(0, self._blocks, host[layer].to(device[layer].device))


def open_window(k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], blocks: Sequence[int]) -> Window:
    """The window for where L1 is."""
    return (HostWindow if k[0].device.type == "cpu" else DeviceWindow)(k, v, blocks)
