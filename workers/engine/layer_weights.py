"""The tensors of one decoder layer. q, k and v are one weight, and so are gate and up: they are read together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.engine.model_config import ModelConfig
from workers.engine.weights import WeightSource


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """Weight [outputs, inputs] and bias [outputs]."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the norms of each query and key head, fp32 [head_dim]."""

    q: torch.Tensor
    k: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Products in the engine's type, norms in fp32."""

    input_norm: torch.Tensor
    qkv: LinearWeights
    head_norms: HeadNorms | None
    output: LinearWeights
    post_norm: torch.Tensor
    gate_up: LinearWeights
    down: LinearWeights


def take_layer(source: WeightSource, index: int, config: ModelConfig, dtype: torch.dtype) -> LayerWeights:
    """The layer's tensors from a model directory. Raises SetupError if one is missing or has another shape."""
    prefix = f"model.layers.{index}"
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    kv, inner = config.num_kv_heads * config.head_dim, config.intermediate_size
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    head_norms: HeadNorms | None = None
    if config.qk_norm:
        names = (f"{attention}.q_norm.weight", f"{attention}.k_norm.weight")
        head_norms = HeadNorms(*(source.take(name, (config.head_dim,), torch.float32) for name in names))
    qkv = [(f"{attention}.q_proj", heads), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)]
    gate_up = [(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)]
    return LayerWeights(
        input_norm=source.take(f"{prefix}.input_layernorm.weight", (hidden,), torch.float32),
        qkv=_fused(source, qkv, hidden, dtype, bias=config.qkv_bias),
        head_norms=head_norms,
        output=_fused(source, [(f"{attention}.o_proj", hidden)], heads, dtype, bias=config.output_bias),
        post_norm=source.take(f"{prefix}.post_attention_layernorm.weight", (hidden,), torch.float32),
        gate_up=_fused(source, gate_up, hidden, dtype, bias=config.mlp_bias),
        down=_fused(source, [(f"{mlp}.down_proj", hidden)], inner, dtype, bias=config.mlp_bias),
    )


def _fused(
    source: WeightSource, parts: Sequence[tuple[str, int]], columns: int, dtype: torch.dtype, *, bias: bool
) -> LinearWeights:
    """One linear from the named ones, stacked by their output rows."""
    weight = torch.cat([source.take(f"{name}.weight", (rows, columns), dtype) for name, rows in parts])
    biases = [source.take(f"{name}.bias", (rows,), dtype) for name, rows in parts] if bias else None
    return LinearWeights(weight, None if biases is None else torch.cat(biases))
