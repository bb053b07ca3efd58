"""Kernels of the engine in C++, for bf16 on processors with AMX. Where they cannot run, torch does the same, slower.

`STRATAKV_NATIVE=0` switches them off.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

from stratakv.config import NATIVE_ENV

__all__ = [
    "Bounds",
    "Head",
    "Segment",
    "Stack",
    "StackShape",
    "StackTables",
    "Step",
    "is_supported",
    "make_head",
    "make_stack",
    "measure_bounds",
]

INTERFACE = 3
"""Counted up with every change of what the module offers: one that was built from older sources is not used."""

GROUP_KEYS = 16
"""Keys that must lie one behind the other: blocks are multiples of it."""
WIDTH_MULTIPLE = 32
"""Of a head, of the residual stream and of the inner part of an MLP."""
HEAD_MULTIPLE = 16
"""Of a vocabulary."""

Segment = tuple["array[int]", "array[int]", int]
"""Rows of a step that attend to the same keys: rows (int32); first slot and length of each run of keys (int64); and how many
keys lie before the first row's own if each later row sees one more, else -1."""


@dataclass(frozen=True, slots=True)
class StackShape:
    """Shape of a model's layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    num_layers: int
    epsilon: float


@dataclass(frozen=True, slots=True)
class StackTables:
    """Addresses of what belongs to no layer, which stay the caller's: `embedding` (bf16) [vocab, hidden], `norm` (fp32) behind
    the last layer, `cosines` and `sines` (fp32) [positions, head_dim / 2]."""

    embedding: int
    vocab: int
    norm: int
    cosines: int
    sines: int
    num_positions: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """What no kernel can do faster on this machine."""

    bytes_per_s: float
    """Read from memory."""
    operations_per_s: float
    """Multiplications and additions of bf16 in the matrix units."""


class Step(Protocol):
    """A step over some rows. It ends before the next one of its stack begins."""

    def run(self, stop: int, out: int, /) -> None:
        """Run the stages before `stop` that have not run yet, without the interpreter lock.

        Stage i finishes layer i - 1 and writes the keys and values of layer i, so there is one more than layers. The last leaves
        the normalised states of the wanted rows at `out` (fp32) [wanted, hidden].
        """


class Head(Protocol):
    """A language-model head."""

    def apply(self, rows: int, num_rows: int, out: int, num_threads: int, /) -> None:
        """Logits `out` (fp32) [rows, vocab] of `rows` (fp32) [rows, width], as exact as by a weight in fp32."""


class Stack(Protocol):
    """The layers of a model; used by one thread at a time."""

    def add_layer(self, weights: tuple[int, ...], biases: tuple[int, ...], norms: tuple[int, ...], /) -> None:
        """Copy the tensors of the next layer: weights (bf16) and biases (fp32, or 0) of q, k, v; output; gate, up; and down; norms
        (fp32) before attention and MLP, and of q and k heads (or 0)."""

    def begin(
        self,
        token_ids: array[int],
        positions: array[int],
        slots: array[int],
        wanted: array[int],
        segments: Sequence[Segment],
        k_caches: array[int],
        v_caches: array[int],
        num_slots: int,
        num_threads: int,
        /,
    ) -> Step:
        """A step: a token, its position and its slot for each row, and the rows whose states are wanted, all int64.

        Every row must be in a segment; its keys are those of all its segments. The caches are addresses, by layer, of bf16
        [num_slots, kv_heads, head_dim]. Raises ValueError.
        """


try:
    from workers.engine.kernels import _kernels
except ImportError:
    _is_built = False
else:
    _is_built = getattr(_kernels, "INTERFACE", 0) == INTERFACE


def is_supported() -> bool:
    """Whether the kernels were built, are wanted, and can run on this processor."""
    return _is_built and os.environ.get(NATIVE_ENV) != "0" and _kernels.is_supported()


def make_stack(shape: StackShape, tables: StackTables) -> Stack:
    """Layers to be added. Raises ValueError for shapes that the kernels do not take."""
    return _kernels.Stack(*astuple(shape), *astuple(tables))


def make_head(weight: int, vocab: int, width: int) -> Head:
    """Copies the weight (bf16) [vocab, width]. Raises ValueError for shapes that the kernels do not take."""
    return _kernels.Head(weight, vocab, width)


def measure_bounds(num_threads: int) -> Bounds:
    """In about half a second; where the kernels are supported only."""
    return Bounds(*_kernels.measure_bounds(num_threads))
