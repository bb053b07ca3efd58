"""Decoder of the Llama family over a paged KV cache: one flattened forward over all tokens of a step.

Products run in the engine's dtype; the residual stream, the norms, the rotation and the logits are fp32, because in bf16
alone two close candidates swap places. q, k, v and gate, up are one linear each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional

from workers.engine.attention import AttentionPart, AttentionPlan
from workers.engine.block_table import Run
from workers.engine.config import EngineDtype
from workers.engine.linear import Linear
from workers.engine.model_config import ModelConfig, ModelFacts, read_model_config
from workers.engine.rope import RotaryEmbedding, rotate
from workers.engine.weights import WeightSource

_MAX_SLICE_WRITES = 4
"""New keys that lie in more runs of slots than this are written by index."""


class PagedTensors(Protocol):
    """K and V of every layer, each [num_blocks, block_size, kv_heads, head_dim]."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]


class LayerHooks(Protocol):
    """What happens around a layer's attention."""

    def before_attention(self, layer: int) -> None: ...

    def after_write(self, layer: int) -> None: ...


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """All tokens of a step, flattened: ids, positions and write places, by sequence; `logit_rows` want logits."""

    token_ids: list[int]
    positions: list[int]
    writes: list[Run]
    parts: list[AttentionPart]
    logit_rows: list[int]


class _Layer:
    """Weights of one decoder layer."""

    def __init__(self, source: WeightSource, index: int, config: ModelConfig, dtype: torch.dtype) -> None:
        prefix = f"model.layers.{index}"
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        kv, inner = config.num_kv_heads * config.head_dim, config.intermediate_size
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        self.input_norm = source.take(f"{prefix}.input_layernorm.weight", (hidden,), torch.float32)
        self.post_norm = source.take(f"{prefix}.post_attention_layernorm.weight", (hidden,), torch.float32)
        qkv = [(f"{attention}.q_proj", heads), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)]
        self.qkv = _fused(source, qkv, hidden, dtype, bias=config.qkv_bias)
        self.output = _fused(source, [(f"{attention}.o_proj", hidden)], heads, dtype, bias=config.output_bias)
        gate_up = [(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)]
        self.gate_up = _fused(source, gate_up, hidden, dtype, bias=config.mlp_bias)
        self.down = _fused(source, [(f"{mlp}.down_proj", hidden)], inner, dtype, bias=config.mlp_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = source.take(f"{attention}.q_norm.weight", (config.head_dim,), torch.float32)
            self.k_norm = source.take(f"{attention}.k_norm.weight", (config.head_dim,), torch.float32)


class Model:
    """A loaded model. Not thread-safe; keeps nothing between forwards."""

    def __init__(
        self, directory: Path, dtype: EngineDtype, device: torch.device, max_model_len: int | None = None
    ) -> None:
        self.config = config = read_model_config(directory, max_model_len)
        self._dtype = dtype.torch_dtype
        self._device = device
        with WeightSource(directory, device) as source:
            vocabulary = (config.vocab_size, config.hidden_size)
            embedding = source.take("model.embed_tokens.weight", vocabulary, torch.float32)
            self._layers = [_Layer(source, i, config, self._dtype) for i in range(config.num_layers)]
            self._norm = source.take("model.norm.weight", (config.hidden_size,), torch.float32)
            if config.tied_embeddings:
                source.ignore("lm_head.weight")
                head = embedding
            else:
                head = source.take("lm_head.weight", vocabulary, torch.float32)
            source.finish()
        self._head = Linear(head)
        self._embedding = embedding.to(self._dtype)
        self._rope = RotaryEmbedding(config.rope, config.max_model_len, device)
        self.facts = ModelFacts(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_model_len=config.max_model_len,
            eos_token_ids=config.eos_token_ids,
            dtype=dtype,
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: PagedTensors, hooks: LayerHooks) -> torch.Tensor:
        """Compute a step, writing its keys and values into `kv`. Returns fp32 logits [len(logit_rows), vocab_size]."""
        tokens = torch.tensor(batch.token_ids, device=self._device)
        cos, sin = self._rope.at(torch.tensor(batch.positions, device=self._device))
        writer = _SlotWriter(batch.writes, self._device)
        plan = AttentionPlan(batch.parts, self._device)
        hidden = functional.embedding(tokens, self._embedding).float()
        for index, layer in enumerate(self._layers):
            q, k, v = self._project(layer, hidden, cos, sin)
            k_cache, v_cache = kv.k[index].flatten(0, 1), kv.v[index].flatten(0, 1)
            writer.write(k, k_cache)
            writer.write(v, v_cache)
            hooks.after_write(index)
            hooks.before_attention(index)
            hidden += layer.output(plan.attend(q, k, v, k_cache, v_cache))
            hidden += self._mlp(layer, hidden)
        rows = hidden[torch.tensor(batch.logit_rows, device=self._device)]
        logits: torch.Tensor = self._head(self._normalise(rows, self._norm))
        return logits

    def _project(
        self, layer: _Layer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated q [num_tokens, num_heads, head_dim], rotated k and v [num_tokens, kv_heads, head_dim]."""
        config = self.config
        normed = self._normalise(hidden, layer.input_norm).to(self._dtype)
        heads = layer.qkv(normed).view(hidden.shape[0], -1, config.head_dim)
        rotating = config.num_heads + config.num_kv_heads
        qk, v = heads[:, :rotating].float(), heads[:, rotating:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk[:, : config.num_heads], qk[:, config.num_heads :]
            qk = torch.cat([self._normalise(q, layer.q_norm), self._normalise(k, layer.k_norm)], dim=1)
        qk = rotate(qk, cos, sin, self._dtype)
        return qk[:, : config.num_heads], qk[:, config.num_heads :], v

    def _mlp(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._normalise(hidden, layer.post_norm).to(self._dtype)
        gate, up = layer.gate_up(normed).chunk(2, dim=-1)
        return layer.down(functional.silu(gate).mul_(up))

    def _normalise(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self.config.rms_norm_eps)


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


def _fused(
    source: WeightSource, parts: Sequence[tuple[str, int]], columns: int, dtype: torch.dtype, *, bias: bool
) -> Linear:
    """One linear from the named ones, stacked by their output rows."""
    weight = torch.cat([source.take(f"{name}.weight", (rows, columns), dtype) for name, rows in parts])
    if not bias:
        return Linear(weight)
    return Linear(weight, torch.cat([source.take(f"{name}.bias", (rows,), dtype) for name, rows in parts]))
