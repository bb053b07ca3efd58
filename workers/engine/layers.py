"""What a model's layers offer, whether torch or the kernels compute them, and what they are given around a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from workers.engine.forward_batch import ForwardBatch
from workers.engine.rope import RotaryEmbedding


class PagedTensors(Protocol):
    """K and V of every layer, each [num_blocks, block_size, kv_heads, head_dim]."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]


class LayerHooks(Protocol):
    """What happens around a layer's attention."""

    @property
    def is_idle(self) -> bool:
        """Nothing happens in this step: no layer need be waited for or told of."""

    def before_attention(self, layer: int) -> None: ...

    def after_write(self, layer: int) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelTables:
    """What belongs to no layer: embedding [vocab, hidden] in the engine's type, the last norm's weight in fp32, angles."""

    embedding: torch.Tensor
    norm: torch.Tensor
    rope: RotaryEmbedding


class DecoderLayers(Protocol):
    """From tokens to the last norm."""

    def forward(self, batch: ForwardBatch, kv: PagedTensors, hooks: LayerHooks) -> torch.Tensor:
        """Writes the step's keys and values into `kv`. Returns the normalised states, fp32 [len(logit_rows), hidden]."""
