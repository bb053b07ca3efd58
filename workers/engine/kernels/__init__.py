"""Kernels of the engine in C++, for bf16 on processors with AMX. Where they cannot run, torch does the same, slower.

`STRATAKV_NATIVE=0` switches them off.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import Protocol

from stratakv.config import NATIVE_ENV

__all__ = ["Plan", "Segment", "add_norm", "apply_head", "gated", "is_supported", "make_plan", "rotate_write"]

INTERFACE = 2
"""Counted up with every change of what the module offers: one that was built from older sources is not used."""

GROUP_KEYS = 16
"""Keys that must lie one behind the other: blocks are multiples of it."""
HEAD_DIM_MULTIPLE = 32
WIDTH_MULTIPLE = 16
"""Of the residual stream and the inner part of an MLP."""

Segment = tuple["array[int]", "array[int]", int]
"""Rows of a step that attend to the same keys: rows (int32); first slot and length of each run of keys (int64); and how many
keys lie before the first row's own if each later row sees one more, else -1."""


class Plan(Protocol):
    """How the rows of a step attend; used in every layer, by one thread at a time."""

    def attend(self, q: int, k_cache: int, v_cache: int, out: int, /) -> None:
        """Attention of one layer, without the interpreter lock. Addresses of bf16 numbers: `q` and `out` [rows, heads,
        head_dim], the caches [slots, kv_heads, head_dim]."""


try:
    from workers.engine.kernels import _kernels
    from workers.engine.kernels._kernels import add_norm, apply_head, gated, rotate_write
except ImportError:
    _is_built = False
else:
    _is_built = getattr(_kernels, "INTERFACE", 0) == INTERFACE


def is_supported() -> bool:
    """Whether the kernels were built, are wanted, and can run on this processor."""
    return _is_built and os.environ.get(NATIVE_ENV) != "0" and _kernels.is_supported()


def make_plan(
    num_heads: int, num_kv_heads: int, head_dim: int, num_rows: int, num_threads: int, segments: Sequence[Segment]
) -> Plan:
    """Every row of 0 .. `num_rows` - 1 must be in a segment; its keys are those of all its segments. Raises ValueError."""
    return _kernels.Plan(num_heads, num_kv_heads, head_dim, num_rows, num_threads, segments)
