"""What happens between the products of a layer, in torch, for the rows of one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from workers.engine.block_table import Run
from workers.engine.forward_batch import ForwardBatch
from workers.engine.layer_weights import HeadNorms
from workers.engine.model_config import ModelConfig
from workers.engine.rope import RotaryEmbedding, rotate
from workers.engine.torch_attention import TorchAttention

_MAX_SLICE_WRITES = 4
"""New keys that lie in more runs of slots than this are written by index."""


class TorchStep:
    """Made once for a step, used in every layer."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, batch: ForwardBatch, rope: RotaryEmbedding) -> None:
        device = rope.device
        self._config = config
        self._dtype = dtype
        self._cos, self._sin = (each.unsqueeze(1) for each in rope.at(batch.positions))
        self._writer = _SlotWriter(batch.writes, device)
        self._attention = TorchAttention(batch.parts, device)
        self._qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def add_norm(self, hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add `added` to the fp32 residual stream `hidden`, in place; the norm of the sum, times `weight`, in the engine's type."""
        hidden += added
        return self._normalise(hidden, weight).to(self._dtype)

    def rotate_write(
        self, heads: torch.Tensor, norms: HeadNorms | None, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        """Normalise and rotate q and k of `heads` [rows, num_heads + 2 × kv_heads, head_dim]. q is kept for `attend`; k and v go to
        the step's slots of the caches [slots, kv_heads, head_dim]."""
        num_heads, num_kv_heads = self._config.num_heads, self._config.num_kv_heads
        qk, v = heads[:, : num_heads + num_kv_heads].float(), heads[:, num_heads + num_kv_heads :]
        if norms is not None:
            q, k = qk[:, :num_heads], qk[:, num_heads:]
            qk = torch.cat([self._normalise(q, norms.q), self._normalise(k, norms.k)], dim=1)
        qk = rotate(qk, self._cos, self._sin, self._dtype)
        self._qkv = qk[:, :num_heads], qk[:, num_heads:], v
        self._writer.write(qk[:, num_heads:], k_cache)
        self._writer.write(v, v_cache)

    def attend(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """Causal attention of every row to all written tokens of its sequence: [rows, num_heads × head_dim]."""
        assert self._qkv is not None
        return self._attention.attend(*self._qkv, k_cache, v_cache)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) × up, the two halves of `gate_up` [rows, 2 × inner]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def _normalise(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._config.rms_norm_eps)


class _SlotWriter:
    """Writes a step's rows to their slots: slice by slice if they lie in few runs, else by index."""

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        self._runs = runs
        self._index: torch.Tensor | None = None
        if len(runs) > _MAX_SLICE_WRITES:
            slots = [slot for run in runs for slot in range(run.start, run.stop)]
            self._index = torch.tensor(slots, device=device)

    def write(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        if self._index is not None:
            cache.index_copy_(0, self._index, rows)
            return
        first = 0
        for run in self._runs:
            cache[run.start : run.stop].copy_(rows[first : first + run.length])
            first += run.length
