"""What happens between the products of a layer, for the rows of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the norms of each query and key head, fp32 [head_dim]."""

    q: torch.Tensor
    k: torch.Tensor


class StepOps(Protocol):
    """Made once for a step, used in every layer by the engine's thread."""

    @property
    def slices(self) -> Sequence[slice]:
        """Rows that go through the products one slice after another, so that what passes between these stays in near memory."""

    def add_norm(self, hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add `added` to the fp32 residual stream `hidden`, in place; the norm of the sum, times `weight`, in the engine's type."""

    def rotate_write(
        self,
        heads: torch.Tensor,
        rows: slice,
        norms: HeadNorms | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> None:
        """Normalise and rotate q and k of `heads` [rows, num_heads + 2 × kv_heads, head_dim], one of the slices. q is kept for
        `attend`; k and v go to the step's slots of the caches [slots, kv_heads, head_dim]."""

    def attend(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """Causal attention of every row to all written tokens of its sequence: [rows, num_heads × head_dim]."""

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) × up, the two halves of `gate_up` [rows, 2 × inner]."""
