"""What happens between the products of a layer, for the rows of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the norms of each query and key head, fp32 [head_dim]."""

    q: torch.Tensor
    k: torch.Tensor


class Rotated(NamedTuple):
    """The step's q [rows, num_heads, head_dim], k and v [rows, kv_heads, head_dim] in the engine's type."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class StepOps(Protocol):
    """Made once for a step, used in every layer by the engine's thread."""

    def add_norm(self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """Add `added` to the fp32 residual stream `hidden`, in place; the norm of the sum, times `weight`, in the engine's type."""

    def rotate_write(
        self, heads: torch.Tensor, norms: HeadNorms | None, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> Rotated:
        """Normalise and rotate q and k of `heads` [rows, num_heads + 2 × kv_heads, head_dim], which is spent; write k and v to
        the step's slots of the caches [slots, kv_heads, head_dim]."""

    def attend(self, rotated: Rotated, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """Causal attention to all written tokens of each row's sequence: [rows, num_heads × head_dim]."""

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) × up, the two halves of `gate_up` [rows, 2 × inner]."""
