"""Decoder of the Llama family over a paged KV cache: one flattened forward over all tokens of a step.

Products run in the engine's dtype; the residual stream, the norms, the rotation and the logits are fp32, because in bf16
alone two close candidates swap places. q, k, v and gate, up are one linear each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional

from workers.engine import native_step
from workers.engine.config import EngineDtype
from workers.engine.forward_batch import ForwardBatch
from workers.engine.head import make_head
from workers.engine.linear import Linear
from workers.engine.model_config import ModelConfig, ModelFacts, read_model_config
from workers.engine.rope import RotaryEmbedding
from workers.engine.step_ops import HeadNorms, StepOps
from workers.engine.torch_step import TorchStep
from workers.engine.weights import WeightSource


class PagedTensors(Protocol):
    """K and V of every layer, each [num_blocks, block_size, kv_heads, head_dim]."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]


class LayerHooks(Protocol):
    """What happens around a layer's attention."""

    def before_attention(self, layer: int) -> None: ...

    def after_write(self, layer: int) -> None: ...


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
        self.head_norms: HeadNorms | None = None
        if config.qk_norm:
            names = (f"{attention}.q_norm.weight", f"{attention}.k_norm.weight")
            self.head_norms = HeadNorms(*(source.take(name, (config.head_dim,), torch.float32) for name in names))


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
        self._head = make_head(head)
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
        ops = self._step_ops(batch, kv.k[0].shape[1])
        hidden = functional.embedding(torch.tensor(batch.token_ids, device=self._device), self._embedding).float()
        added = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        for index, layer in enumerate(self._layers):
            k_cache, v_cache = kv.k[index].flatten(0, 1), kv.v[index].flatten(0, 1)
            for part in ops.slices:
                normed = ops.add_norm(hidden[part], added[part], layer.input_norm)
                heads = layer.qkv(normed).view(len(normed), -1, self.config.head_dim)
                ops.rotate_write(heads, part, layer.head_norms, k_cache, v_cache)
            hooks.after_write(index)
            hooks.before_attention(index)
            attended, slices = ops.attend(k_cache, v_cache), ops.slices
            if index == len(self._layers) - 1:
                # Behind the last keys and values only the rows that want logits go on.
                rows = torch.tensor(batch.logit_rows, device=self._device)
                hidden, added, attended, slices = hidden[rows], added[rows], attended[rows], [slice(0, len(rows))]
            for part in slices:
                normed = ops.add_norm(hidden[part], layer.output(attended[part]), layer.post_norm)
                added[part] = layer.down(ops.gated(layer.gate_up(normed)))
        hidden += added
        return self._head(functional.rms_norm(hidden, self._norm.shape, self._norm, self.config.rms_norm_eps))

    def _step_ops(self, batch: ForwardBatch, block_size: int) -> StepOps:
        if native_step.can_run(self.config, self._dtype, self._device, block_size):
            return native_step.NativeStep(self.config, batch, self._rope)
        return TorchStep(self.config, self._dtype, batch, self._rope)


def _fused(
    source: WeightSource, parts: Sequence[tuple[str, int]], columns: int, dtype: torch.dtype, *, bias: bool
) -> Linear:
    """One linear from the named ones, stacked by their output rows."""
    weight = torch.cat([source.take(f"{name}.weight", (rows, columns), dtype) for name, rows in parts])
    if not bias:
        return Linear(weight)
    return Linear(weight, torch.cat([source.take(f"{name}.bias", (rows,), dtype) for name, rows in parts]))
