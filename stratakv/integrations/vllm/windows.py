"""Some of vLLM's blocks as memory that the pool's transports read and write.

On the CPU that is vLLM's memory itself, so that bytes move once. On a CUDA device it is pinned host memory; each layer is copied
to or from the device on a stream of its own, ordered against vLLM's stream by events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from stratakv.integrations.vllm.kv_tensors import LayerTensor
from stratakv.pool.pages import PageMemory, RangeMemory


class Window(Protocol):
    """Some blocks, layer by layer."""

    @property
    def is_direct(self) -> bool:
        """Whether the memory is vLLM's own; `fetch` and `publish` then do nothing."""

    @property
    def memory(self) -> PageMemory:
        """Where the blocks lie in host memory, in their order."""

    def fetch(self, layer: int) -> None:
        """Before the memory of a layer is read: make it equal vLLM's. Blocks."""

    def publish(self, layer: int) -> None:
        """After the memory of a layer was written: have it copied to vLLM's; does not wait for the copy."""

    def wait_published(self, layer: int) -> None:
        """Let vLLM's current stream wait for that copy."""

    def finish(self) -> None:
        """Wait until no copy is under way."""


class Stamps(Protocol):
    """When vLLM's stream was done with layers."""

    def mark(self, layer: int) -> None:
        """Everything vLLM has queued till now comes before this layer is read."""

    def wait(self, layer: int) -> None:
        """Wait for the mark. Blocks, without the interpreter lock."""


OpenWindow = Callable[[Sequence[int], Stamps | None], Window]
"""Of some blocks; with stamps if it is to be read."""


class HostWindow:
    """Blocks in host memory, in place."""

    is_direct = True

    def __init__(self, layers: Sequence[Sequence[RangeMemory]], blocks: Sequence[int]) -> None:
        self.memory = PageMemory(layers, np.array(blocks, dtype=np.int64))

    def fetch(self, layer: int) -> None:
        """The memory is vLLM's."""

    def publish(self, layer: int) -> None:
        """The memory is vLLM's."""

    def wait_published(self, layer: int) -> None:
        """The memory is vLLM's."""

    def finish(self) -> None:
        """No copy is ever made."""


class CudaStamps:
    """An event for each layer of one step."""

    def __init__(self, num_layers: int) -> None:
        self._events: list[Any] = [torch.cuda.Event() for _ in range(num_layers)]  # type: ignore[no-untyped-call]

    def mark(self, layer: int) -> None:
        self._events[layer].record()

    def wait(self, layer: int) -> None:
        self._events[layer].synchronize()


class CudaWindow:
    """Blocks in device memory, through pinned host memory."""

    is_direct = False

    def __init__(
        self, layers: Sequence[LayerTensor], blocks: Sequence[int], stream: Any, stamps: Stamps | None
    ) -> None:
        self._stream = stream
        self._stamps = stamps
        self._device = [[_rows(layer.storage, run) for run in layer.runs] for layer in layers]
        self._host = [
            [torch.empty((len(blocks), run.size), dtype=torch.uint8, pin_memory=True) for run in layer.runs]
            for layer in layers
        ]
        self._blocks = torch.tensor(list(blocks)).pin_memory().to(layers[0].storage.device, non_blocking=True)
        self._published: list[Any] = [None] * len(layers)
        memory = [[_range_memory(host) for host in layer] for layer in self._host]
        self.memory = PageMemory(memory, np.arange(len(blocks), dtype=np.int64))
        # What was queued above must be there before the other stream reads it.
        stream.wait_stream(torch.cuda.current_stream())

    def fetch(self, layer: int) -> None:
        if self._stamps is not None:
            self._stamps.wait(layer)
        with torch.cuda.stream(self._stream):
            for host, device in zip(self._host[layer], self._device[layer], strict=True):
                host.copy_(device.index_select(0, self._blocks), non_blocking=True)
        self._stream.synchronize()

    def publish(self, layer: int) -> None:
        with torch.cuda.stream(self._stream):
            for host, device in zip(self._host[layer], self._device[layer], strict=True):
                device.index_copy_(0, self._blocks, host.to(device.device, non_blocking=True))
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._published[layer] = event

    def wait_published(self, layer: int) -> None:
        torch.cuda.current_stream().wait_event(self._published[layer])

    def finish(self) -> None:
        self._stream.synchronize()


def windows_of(layers: Sequence[LayerTensor]) -> OpenWindow:
    """Opens windows on these tensors, wherever they are."""
    if layers[0].storage.device.type == "cpu":
        memory = [[RangeMemory(_bytes(layer.storage), run.start, run.stride) for run in layer.runs] for layer in layers]
        return lambda blocks, stamps: HostWindow(memory, blocks)
    stream = torch.cuda.Stream(device=layers[0].storage.device)  # type: ignore[no-untyped-call]
    return lambda blocks, stamps: CudaWindow(layers, blocks, stream, stamps)


def _rows(storage: torch.Tensor, run: Any) -> torch.Tensor:
    rows = (storage.numel() - run.start - run.size) // run.stride + 1
    return storage.as_strided((rows, run.size), (run.stride, 1), run.start)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.numpy().data


def _range_memory(host: torch.Tensor) -> RangeMemory:
    return RangeMemory(_bytes(host.view(-1)), 0, host.shape[1])
