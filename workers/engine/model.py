"""Decoder of the Llama family over a paged KV cache: one flattened forward over all tokens of a step.

Products run in the engine's dtype; the residual stream, the norms, the rotation and the logits are fp32, because in bf16
alone two close candidates swap places.
"""

from __future__ import annotations

from pathlib import Path

import torch

from workers.engine import native_layers
from workers.engine.config import EngineDtype
from workers.engine.forward_batch import ForwardBatch
from workers.engine.head import make_head
from workers.engine.layer_weights import take_layer
from workers.engine.layers import DecoderLayers, LayerHooks, ModelTables, PagedTensors
from workers.engine.model_config import ModelConfig, ModelFacts, read_model_config
from workers.engine.native_layers import NativeLayers
from workers.engine.rope import RotaryEmbedding
from workers.engine.torch_layers import TorchLayers
from workers.engine.weights import WeightSource


class Model:
    """A loaded model, for caches of blocks of `block_size`. Not thread-safe."""

    def __init__(
        self,
        directory: Path,
        dtype: EngineDtype,
        device: torch.device,
        max_model_len: int | None = None,
        *,
        block_size: int = 16,
    ) -> None:
        self.config = config = read_model_config(directory, max_model_len)
        with WeightSource(directory, device) as source:
            vocabulary = (config.vocab_size, config.hidden_size)
            embedding = source.take("model.embed_tokens.weight", vocabulary, torch.float32)
            tables = ModelTables(
                embedding.to(dtype.torch_dtype),
                source.take("model.norm.weight", (config.hidden_size,), torch.float32),
                RotaryEmbedding(config.rope, config.max_model_len, device),
            )
            self._layers = _make_layers(config, tables, source, block_size)
            if config.tied_embeddings:
                source.ignore("lm_head.weight")
                head = embedding
            else:
                head = source.take("lm_head.weight", vocabulary, torch.float32)
            source.finish()
        self._head = make_head(head)
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
        return self._head(self._layers.forward(batch, kv, hooks))


def _make_layers(config: ModelConfig, tables: ModelTables, source: WeightSource, block_size: int) -> DecoderLayers:
    dtype, device = tables.embedding.dtype, tables.embedding.device
    weights = (take_layer(source, index, config, dtype) for index in range(config.num_layers))
    if native_layers.can_run(config, dtype, device, block_size):
        return NativeLayers(config, tables, weights)
    return TorchLayers(config, tables, weights)
