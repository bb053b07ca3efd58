"""The operations of a step by the kernels: bf16 on processors that can run them. Each is one pass over memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import torch

from workers.engine import kernels
from workers.engine.attention_parts import AttentionPart, split_shared
from workers.engine.block_table import Run
from workers.engine.forward_batch import ForwardBatch
from workers.engine.model_config import ModelConfig
from workers.engine.rope import RotaryEmbedding
from workers.engine.step_ops import HeadNorms

_SLICE_ROWS = 512
"""What so many rows hold between two products fits a processor's second-level cache."""


def can_run(config: ModelConfig, dtype: torch.dtype, device: torch.device, block_size: int) -> bool:
    """Whether the kernels take this model here."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and block_size % kernels.GROUP_KEYS == 0
        and config.head_dim % kernels.HEAD_DIM_MULTIPLE == 0
        and config.hidden_size % kernels.WIDTH_MULTIPLE == 0
        and config.intermediate_size % kernels.WIDTH_MULTIPLE == 0
        and kernels.is_supported()
    )


class NativeStep:
    """Makes `StepOps` of kernels."""

    def __init__(self, config: ModelConfig, batch: ForwardBatch, rope: RotaryEmbedding) -> None:
        self._config = config
        self._num_threads = torch.get_num_threads()
        self._cos, self._sin = rope.at(batch.positions)
        self._slots = torch.tensor([slot for run in batch.writes for slot in range(run.start, run.stop)])
        num_rows = len(batch.token_ids)
        self._q = torch.empty(num_rows, config.num_heads * config.head_dim, dtype=torch.bfloat16)
        self.slices = [slice(at, min(at + _SLICE_ROWS, num_rows)) for at in range(0, num_rows, _SLICE_ROWS)]
        self._plan = kernels.make_plan(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            num_rows,
            self._num_threads,
            list(_segments(batch.parts)),
        )

    def add_norm(self, hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty(hidden.shape, dtype=torch.bfloat16)
        kernels.add_norm(
            hidden.data_ptr(),
            added.data_ptr(),
            weight.data_ptr(),
            self._config.rms_norm_eps,
            hidden.shape[0],
            hidden.shape[1],
            out.data_ptr(),
            self._num_threads,
        )
        return out

    def rotate_write(
        self,
        heads: torch.Tensor,
        rows: slice,
        norms: HeadNorms | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> None:
        config = self._config
        kernels.rotate_write(
            heads.data_ptr(),
            self._cos[rows].data_ptr(),
            self._sin[rows].data_ptr(),
            0 if norms is None else norms.q.data_ptr(),
            0 if norms is None else norms.k.data_ptr(),
            config.rms_norm_eps,
            self._slots[rows].data_ptr(),
            self._q[rows].data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            heads.shape[0],
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            self._num_threads,
        )

    def attend(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(self._q)
        self._plan.attend(self._q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr())
        return out

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=gate_up.dtype)
        kernels.gated(gate_up.data_ptr(), rows, width, out.data_ptr(), self._num_threads)
        return out


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
