"""How fast a model could be computed at best: bytes to read and operations to do, by what the machine was measured to do."""

from __future__ import annotations

from dataclasses import dataclass

from workers.engine.kernels import Bounds
from workers.engine.model_config import ModelConfig

_WEIGHT_BYTES = 2
_HEAD_PARTS = 3
"""Products in bf16 that stand for one of the head's in fp32."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one step."""

    num_bytes: float
    """Weights, and keys and values of earlier tokens, each read once."""
    num_operations: float

    def seconds(self, bounds: Bounds) -> float:
        """The least time: reading and computing go on side by side."""
        return max(self.num_bytes / bounds.bytes_per_s, self.num_operations / bounds.operations_per_s)


def prefill_cost(config: ModelConfig, num_tokens: int) -> Cost:
    """One prompt, of which the last token wants logits."""
    pairs = num_tokens * (num_tokens + 1) / 2
    operations = 2.0 * _layer_weights(config) * num_tokens + _pair_operations(config) * pairs
    return Cost(_WEIGHT_BYTES * (_layer_weights(config) + _head_weights(config)), operations + _head_operations(config))


def decode_cost(config: ModelConfig, batch: int, num_before: float) -> Cost:
    """One token for each of `batch` sequences that have `num_before` tokens of their own."""
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * _WEIGHT_BYTES
    num_bytes = _WEIGHT_BYTES * (_layer_weights(config) + _head_weights(config)) + batch * num_before * token_bytes
    per_row = 2.0 * _layer_weights(config) + _pair_operations(config) * num_before + _head_operations(config)
    return Cost(num_bytes, batch * per_row)


def _layer_weights(config: ModelConfig) -> int:
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return config.num_layers * config.hidden_size * (2 * heads + 2 * kv + 3 * config.intermediate_size)


def _head_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def _head_operations(config: ModelConfig) -> float:
    return 2.0 * _HEAD_PARTS * _head_weights(config)


def _pair_operations(config: ModelConfig) -> float:
    """Of a query's token with one key's: a product with the key and one with the value, in each head."""
    return 4.0 * config.num_layers * config.num_heads * config.head_dim
