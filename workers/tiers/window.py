"""The door between L1's tensors and memory that transports can move bytes to and from.

A window is a set of L1 blocks. On the CPU its memory is L1 itself, so that bytes move once; on a CUDA device it is pinned
buffers, copied to and from the blocks one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from stratakv.pool.pages import PageMemory, RangeMemory

OpenWindow = Callable[[Sequence[int]], "Window"]
"""Makes the window of some blocks of one L1."""


class Window(Protocol):
    """Some blocks of L1, layer by layer."""

    @property
    def is_l1(self) -> bool:
        """Whether the memory is L1 itself; `fetch` and `publish` then do nothing."""

    @property
    def memory(self) -> PageMemory:
        """Where the blocks lie in host memory, in their order."""

    def fetch(self, layer: int) -> None:
        """Before reading the memory of a layer: make it equal L1."""

    def publish(self, layer: int) -> None:
        """After writing the memory of a layer: make L1 equal it."""


def _ranges(k: torch.Tensor, v: torch.Tensor) -> tuple[RangeMemory, ...]:
    """K and V of one layer, a row being a block."""
    both = [t.view(torch.uint8).reshape(-1).numpy().data for t in (k, v)]
    return tuple(RangeMemory(memory, 0, len(memory) // k.shape[0]) for memory in both)


class HostWindow:
    """Blocks of an L1 in host memory, in place."""

    is_l1 = True

    def __init__(self, layers: Sequence[Sequence[RangeMemory]], blocks: Sequence[int]) -> None:
        self.memory = PageMemory(layers, np.array(blocks, dtype=np.int64))

    def fetch(self, layer: int) -> None:
        """The memory is L1."""

    def publish(self, layer: int) -> None:
        """The memory is L1."""


class DeviceWindow:
    """Blocks of an L1 in device memory, through pinned host buffers."""

    is_l1 = False

    def __init__(self, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], blocks: Sequence[int]) -> None:
        self._device = (k, v)
        shape = (len(blocks), *k[0].shape[1:])
        pin = k[0].device.type == "cuda"
        self._host = tuple([torch.empty(shape, dtype=k[0].dtype, pin_memory=pin) for _ in k] for _ in range(2))
        self._blocks = torch.tensor(list(blocks), device=k[0].device)
        layers = [_ranges(*pair) for pair in zip(*self._host, strict=True)]
        self.memory = PageMemory(layers, np.arange(len(blocks), dtype=np.int64))

    def fetch(self, layer: int) -> None:
        for host, device in zip(self._host, self._device, strict=True):
            host[layer].copy_(device[layer].index_select(0, self._blocks))

    def publish(self, layer: int) -> None:
        for host, device in zip(self._host, self._device, strict=True):
            device[layer].index_copy_(0, self._blocks, host[layer].to(device[layer].device))


def windows_of(k: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> OpenWindow:
    """Opens windows on an L1, wherever it is."""
    if k[0].device.type != "cpu":
        return lambda blocks: DeviceWindow(k, v, blocks)
    layers = [_ranges(*pair) for pair in zip(k, v, strict=True)]
    return lambda blocks: HostWindow(layers, blocks)
