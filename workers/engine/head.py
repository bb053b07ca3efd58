"""The language-model head: fp32 logits, whatever the type of the other products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.engine import kernels
from workers.engine.linear import Linear

Head = Callable[[torch.Tensor], torch.Tensor]
"""fp32 [rows, hidden] → fp32 [rows, vocab]."""


def make_head(weight: torch.Tensor) -> Head:
    """`weight` [vocab, hidden] is fp32. One that loses nothing in bf16 is kept and read so by the kernel: half the bytes."""
    rounded = weight.to(torch.bfloat16)
    vocab, hidden = weight.shape
    is_native = (
        weight.device.type == "cpu"
        and vocab % kernels.HEAD_MULTIPLE == 0
        and hidden % kernels.WIDTH_MULTIPLE == 0
        and kernels.is_supported()
        and torch.equal(rounded.float(), weight)
    )
    return NativeHead(rounded) if is_native else Linear(weight)


class NativeHead:
    """By the kernel, which splits fp32 rows into sums of bf16 numbers: as exact as products in fp32."""

    def __init__(self, weight: torch.Tensor) -> None:
        """`weight` (bf16) [vocab, hidden] is copied."""
        self._vocab, hidden = weight.shape
        self._head = kernels.make_head(weight.data_ptr(), self._vocab, hidden)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.contiguous()
        out = torch.empty(len(rows), self._vocab)
        self._head.apply(rows.data_ptr(), len(rows), out.data_ptr(), torch.get_num_threads())
        return out
