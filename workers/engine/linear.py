"""A linear layer whose weight is laid out once for the products it will be used in."""

from __future__ import annotations

import torch
from torch.nn import functional

_PACK_FOR_ROWS = 32
"""oneDNN picks a weight layout for this many rows; measured good from 1 row to thousands."""


class Linear:
    """`x @ weight.T + bias`. On a CPU with oneDNN the weight is kept in its blocked layout, which reads it faster."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed = _can_pack(weight)
        self._bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR_ROWS) if self._packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return out
        return functional.linear(x, self._weight, self._bias)


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
