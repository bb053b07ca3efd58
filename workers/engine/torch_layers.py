"""A model's layers in torch: for every type, device and shape."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional

from workers.engine.forward_batch import ForwardBatch
from workers.engine.layer_weights import LayerWeights, LinearWeights
from workers.engine.layers import LayerHooks, ModelTables, PagedTensors
from workers.engine.linear import Linear
from workers.engine.model_config import ModelConfig
from workers.engine.torch_step import TorchStep


class TorchLayers:
    """`DecoderLayers` of plain torch operations."""

    def __init__(self, config: ModelConfig, tables: ModelTables, layers: Iterable[LayerWeights]) -> None:
        self._config = config
        self._tables = tables
        self._layers = [_Layer(weights) for weights in layers]

    def forward(self, batch: ForwardBatch, kv: PagedTensors, hooks: LayerHooks) -> torch.Tensor:
        embedding, norm, config = self._tables.embedding, self._tables.norm, self._config
        device, dtype = embedding.device, embedding.dtype
        step = TorchStep(config, dtype, batch, self._tables.rope)
        hidden = functional.embedding(torch.tensor(batch.token_ids, device=device), embedding).float()
        added = torch.zeros(hidden.shape, dtype=dtype, device=device)
        for index, layer in enumerate(self._layers):
            k_cache, v_cache = kv.k[index].flatten(0, 1), kv.v[index].flatten(0, 1)
            normed = step.add_norm(hidden, added, layer.weights.input_norm)
            heads = layer.qkv(normed).view(len(normed), -1, config.head_dim)
            step.rotate_write(heads, layer.weights.head_norms, k_cache, v_cache)
            hooks.after_write(index)
            hooks.before_attention(index)
            attended = step.attend(k_cache, v_cache)
            if index == len(self._layers) - 1:
                # Behind the last keys and values only the rows that want logits go on.
                rows = torch.tensor(batch.logit_rows, device=device)
                hidden, attended = hidden[rows], attended[rows]
            normed = step.add_norm(hidden, layer.output(attended), layer.weights.post_norm)
            added = layer.down(step.gated(layer.gate_up(normed)))
        hidden += added
        return functional.rms_norm(hidden, norm.shape, norm, config.rms_norm_eps)


class _Layer:
    """A layer with its products laid out."""

    def __init__(self, weights: LayerWeights) -> None:
        self.weights = weights
        self.qkv, self.output = _linear(weights.qkv), _linear(weights.output)
        self.gate_up, self.down = _linear(weights.gate_up), _linear(weights.down)


def _linear(weights: LinearWeights) -> Linear:
    return Linear(weights.weight, weights.bias)
