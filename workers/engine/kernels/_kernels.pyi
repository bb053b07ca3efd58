"""The C++ module; `workers.engine.kernels` says what each part does."""

from array import array
from collections.abc import Sequence

from workers.engine.kernels import Segment

INTERFACE: int

class Step:
    def run(self, stop: int, out: int, /) -> None: ...

class Stack:
    def __new__(
        cls,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden: int,
        inner: int,
        num_layers: int,
        epsilon: float,
        embedding: int,
        vocab: int,
        norm: int,
        cosines: int,
        sines: int,
        num_positions: int,
        /,
    ) -> Stack: ...
    def add_layer(self, weights: tuple[int, ...], biases: tuple[int, ...], norms: tuple[int, ...], /) -> None: ...
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
    ) -> Step: ...

def is_supported() -> bool: ...
def measure_bounds(num_threads: int, /) -> tuple[float, float]: ...

class Head:
    def __new__(cls, weight: int, vocab: int, width: int, /) -> Head: ...
    def apply(self, rows: int, num_rows: int, out: int, num_threads: int, /) -> None: ...
