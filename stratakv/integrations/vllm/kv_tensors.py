"""vLLM's KV tensors as pages: which byte ranges of each tensor one block is, and access to them in place.

vLLM gives each layer a tensor whose first axis counts blocks. A page holds one block of every layer; the bytes of a layer are
taken as they lie, run by run, so that nothing is rearranged. Layers that share a tensor are one layer here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stratakv.errors import SetupError
from stratakv.layout import KVLayout, LayerSpec, RangeSpec

RUNS_MAX = 64
"""Contiguous runs of one block in one layer; a layout that scatters more is not worth moving in pieces."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of a block that follow each other: those of block n begin at `start + n * stride` of the storage."""

    start: int
    stride: int
    size: int


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """One layer's memory."""

    names: tuple[str, ...]
    storage: torch.Tensor
    """All bytes of the tensor's storage, flat."""
    runs: tuple[Run, ...]


def layer_tensors(kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> tuple[LayerTensor, ...]:
    """The layers in vLLM's order. Raises SetupError for tensors that are not made of blocks."""
    names: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    tensors: dict[tuple[int, tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}
    for name, tensor in kv_caches.items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        names.setdefault(identity, []).append(name)
        tensors.setdefault(identity, tensor)
    return tuple(
        LayerTensor(tuple(names[identity]), _storage_bytes(tensor), _runs(names[identity][0], tensor, num_blocks))
        for identity, tensor in tensors.items()
    )


def layout_of(
    layers: tuple[LayerTensor, ...], block_size: int, dtype: str, group: int, tp_rank: int, pp_rank: int
) -> KVLayout:
    """The layout of pages of one block."""
    specs = tuple(
        LayerSpec(tuple(RangeSpec(f"run{n}", run.size) for n, run in enumerate(layer.runs))) for layer in layers
    )
    return KVLayout(block_size, dtype, specs, group, tp_rank=tp_rank, pp_rank=pp_rank)


def _storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _runs(name: str, tensor: torch.Tensor, num_blocks: int) -> tuple[Run, ...]:
    if not tensor.ndim or num_blocks < 1 or tensor.shape[0] % num_blocks:
        raise SetupError(
            f"the KV tensor of {name} has the shape {tuple(tensor.shape)}, whose first axis does not count "
            f"{num_blocks} blocks",
            hint="This version of StrataKV knows vLLM's layouts that begin with blocks (VLLM_KV_CACHE_LAYOUT=LBNHC).",
        )
    # A view: blocks that vLLM has split for its kernels lie side by side.
    by_block = tensor.view(num_blocks, -1, *tensor.shape[1:])
    item = tensor.element_size()
    strides = [int(stride) * item for stride in by_block.stride()]
    axes = sorted(zip(strides[1:], map(int, by_block.shape[1:]), strict=True), reverse=True)
    size = item
    while axes and (axes[-1][1] == 1 or axes[-1][0] == size):
        size *= axes.pop()[1]
    outer = [(stride, length) for stride, length in axes if length > 1]
    offsets = [sum(steps) for steps in itertools.product(*([n * s for n in range(length)] for s, length in outer))]
    if len(offsets) > RUNS_MAX:
        raise SetupError(f"a block of {name} lies in {len(offsets)} pieces; at most {RUNS_MAX} are moved")
    first = int(tensor.storage_offset()) * item
    return tuple(Run(first + offset, strides[0], size) for offset in sorted(offsets))
