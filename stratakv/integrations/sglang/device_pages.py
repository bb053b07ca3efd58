"""Pages of one of SGLang's device pools, copied to and from host memory that the pool's transports use.

A device pool has buffers, each for some layer; a page is the same rows of all of them, and lies in the pool layer after layer.
Knows SGLang's `DevicePoolEntry` by its attributes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stratakv.layout import KVLayout, LayerSpec, RangeSpec
from stratakv.pool.pages import PageMemory, RangeMemory


class DevicePages:
    """`buffers[layer][range]`, for the layers that the pool has part in."""

    def __init__(self, entry: Any, dtype: str, tp_rank: int, pp_rank: int) -> None:
        self._entry = entry
        self._span = round(entry.buffer_meta[0][0][2] * entry.components[0][0].shape[0] / entry.components[0][0].nbytes)
        self.layers = sorted(entry.layer_mapping)
        """SGLang's numbers of the layers of a page, in their order."""
        self._buffers = [self._of_layer(layer) for layer in self.layers]
        specs = tuple(
            LayerSpec(tuple(RangeSpec(f"{entry.name}:{n}", self._row_bytes(b)) for n, b in enumerate(buffers)))
            for buffers in self._buffers
        )
        self.layout = KVLayout(int(entry.page_size), dtype, specs, tp_rank=tp_rank, pp_rank=pp_rank)

    def open(self, indices: torch.Tensor) -> DeviceWindow:
        """The pages of these device indices. Raises ValueError unless they are whole pages."""
        rows = torch.tensor(self._entry.prepare_locations(indices), dtype=torch.int64)
        return DeviceWindow(self._buffers, (rows[:, None] + torch.arange(self._span)).reshape(-1), self._span)

    def _of_layer(self, layer: int) -> list[torch.Tensor]:
        mapped = self._entry.layer_mapping[layer]
        numbers = [mapped] if isinstance(mapped, int) else list(mapped)
        return [component[number] for component in self._entry.components for number in numbers]

    def _row_bytes(self, buffer: torch.Tensor) -> int:
        return int(buffer[0].numel() * buffer.element_size() * self._span)


class DeviceWindow:
    """Some pages: their rows in the buffers, and host memory of the same size."""

    def __init__(self, buffers: Sequence[Sequence[torch.Tensor]], rows: torch.Tensor, span: int) -> None:
        self._buffers = buffers
        self._rows = rows.to(buffers[0][0].device)
        pin = self._rows.device.type == "cuda"
        self._host = [
            [torch.empty((len(rows), *b.shape[1:]), dtype=b.dtype, pin_memory=pin) for b in layer] for layer in buffers
        ]
        num_pages = len(rows) // span
        self.memory = PageMemory(
            [[_range(host, num_pages) for host in layer] for layer in self._host], np.arange(num_pages, dtype=np.int64)
        )

    def fetch(self) -> None:
        """Make host memory equal the device's; blocks."""
        for layer, buffers in enumerate(self._buffers):
            for host, buffer in zip(self._host[layer], buffers, strict=True):
                _raw(host).copy_(_raw(buffer).index_select(0, self._rows))

    def publish(self, layer: int) -> None:
        """Make one layer of the device's memory equal the host's; blocks until it is."""
        for host, buffer in zip(self._host[layer], self._buffers[layer], strict=True):
            _raw(buffer).index_copy_(0, self._rows, _raw(host).to(buffer.device))
        if self._rows.device.type == "cuda":
            torch.cuda.current_stream(self._rows.device).synchronize()


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The same rows as bytes: not every element type can be indexed."""
    return tensor.view(torch.uint8)


def _range(host: torch.Tensor, num_pages: int) -> RangeMemory:
    view = host.view(torch.uint8).reshape(-1).numpy().data
    return RangeMemory(view, 0, len(view) // num_pages if num_pages else 0)
