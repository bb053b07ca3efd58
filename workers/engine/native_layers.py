"""A model's layers by the kernels: bf16 on processors that can run them. A step is one call, without the interpreter lock."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

import torch

from workers.engine import kernels
from workers.engine.attention_parts import AttentionPart, split_shared
from workers.engine.block_table import Run
from workers.engine.forward_batch import ForwardBatch
from workers.engine.layer_weights import LayerWeights, LinearWeights
from workers.engine.layers import LayerHooks, ModelTables, PagedTensors
from workers.engine.model_config import ModelConfig


def can_run(config: ModelConfig, dtype: torch.dtype, device: torch.device, block_size: int) -> bool:
    """Whether the kernels take this model here."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and block_size % kernels.GROUP_KEYS == 0
        and all(
            width % kernels.WIDTH_MULTIPLE == 0
            for width in (config.head_dim, config.hidden_size, config.intermediate_size)
        )
        and kernels.is_supported()
    )


class NativeLayers:
    """`DecoderLayers` of kernels. The weights are copied into the layout of theirs."""

    def __init__(self, config: ModelConfig, tables: ModelTables, layers: Iterable[LayerWeights]) -> None:
        self._config = config
        self._tables = tables
        self._stack = kernels.make_stack(
            kernels.StackShape(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                hidden=config.hidden_size,
                inner=config.intermediate_size,
                num_layers=config.num_layers,
                epsilon=config.rms_norm_eps,
            ),
            kernels.StackTables(
                embedding=tables.embedding.data_ptr(),
                vocab=len(tables.embedding),
                norm=tables.norm.data_ptr(),
                cosines=tables.rope.cosines.data_ptr(),
                sines=tables.rope.sines.data_ptr(),
                num_positions=len(tables.rope.cosines),
            ),
        )
        for weights in layers:
            self._add(weights)

    def forward(self, batch: ForwardBatch, kv: PagedTensors, hooks: LayerHooks) -> torch.Tensor:
        out = torch.empty(len(batch.logit_rows), self._config.hidden_size)
        step = self._stack.begin(
            array("q", batch.token_ids),
            array("q", batch.positions),
            array("q", [slot for run in batch.writes for slot in range(run.start, run.stop)]),
            array("q", batch.logit_rows),
            list(_segments(batch.parts)),
            array("q", [cache.data_ptr() for cache in kv.k]),
            array("q", [cache.data_ptr() for cache in kv.v]),
            kv.k[0].shape[0] * kv.k[0].shape[1],
            torch.get_num_threads(),
        )
        num_layers = self._config.num_layers
        for layer in range(0 if hooks.is_idle else num_layers):
            step.run(layer + 1, out.data_ptr())
            hooks.after_write(layer)
            hooks.before_attention(layer)
        step.run(num_layers + 1, out.data_ptr())
        return out

    def _add(self, layer: LayerWeights) -> None:
        products = (layer.qkv, layer.output, layer.gate_up, layer.down)
        biases = [_bias(product) for product in products]
        q_norm, k_norm = (None, None) if layer.head_norms is None else (layer.head_norms.q, layer.head_norms.k)
        self._stack.add_layer(
            _addresses([product.weight for product in products]),
            _addresses(biases),
            _addresses([layer.input_norm, layer.post_norm, q_norm, k_norm]),
        )


def _bias(product: LinearWeights) -> torch.Tensor | None:
    return None if product.bias is None else product.bias.float()


def _addresses(tensors: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _segments(parts: Sequence[AttentionPart]) -> Iterator[kernels.Segment]:
    decodes = [part for part in parts if part.num_rows == 1]
    shared, own = split_shared([part.slots for part in decodes], kernels.GROUP_KEYS)
    for rows, run in shared:
        yield _segment([decodes[row].first_row for row in rows], [run], -1)
    for part, slots in zip(decodes, own, strict=True):
        yield _segment([part.first_row], slots, -1)
    for part in parts:
        if part.num_rows > 1:
            yield _segment(range(part.first_row, part.first_row + part.num_rows), part.slots, part.num_before)


def _segment(rows: Sequence[int], slots: Sequence[Run], causal_from: int) -> kernels.Segment:
    runs = array("q", [number for run in slots for number in (run.start, run.length)])
    return array("i", rows), runs, causal_from
