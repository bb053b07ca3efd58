"""The C++ module; `workers.engine.kernels` says what each part does."""

from collections.abc import Sequence

from workers.engine.kernels import Segment

INTERFACE: int

class Plan:
    def __new__(
        cls,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_rows: int,
        num_threads: int,
        segments: Sequence[Segment],
        /,
    ) -> Plan: ...
    def attend(self, q: int, k_cache: int, v_cache: int, out: int, /) -> None: ...

def is_supported() -> bool: ...
def add_norm(
    hidden: int, added: int, weight: int, epsilon: float, num_rows: int, width: int, out: int, num_threads: int, /
) -> None:
    """Addresses of `hidden` (fp32) [rows, width], `added` (bf16), `weight` (fp32) and `out` (bf16)."""

def rotate_write(
    heads: int,
    cosines: int,
    sines: int,
    q_norm: int,
    k_norm: int,
    epsilon: float,
    slots: int,
    q_out: int,
    k_cache: int,
    v_cache: int,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_threads: int,
    /,
) -> None:
    """q is rotated into `q_out` [rows, num_heads, head_dim], k into its slot (int64) of the cache; v is copied. Norms may be 0."""

def gated(gate_up: int, num_rows: int, width: int, out: int, num_threads: int, /) -> None:
    """silu(gate) × up of bf16 [rows, 2 × width]."""

def apply_head(rows: int, weight: int, num_rows: int, vocab: int, width: int, out: int, num_threads: int, /) -> None:
    """Logits `out` (fp32) [rows, vocab] of `rows` (fp32) [rows, width] by `weight` (bf16) [vocab, width]."""
