"""What an engine is told at start: the model, where it computes, and every limit."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

import torch

from stratakv.errors import SetupError


class EngineDtype(enum.StrEnum):
    """Type of products and of the KV cache; residual stream, norms and logits are always fp32."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return _TORCH_DTYPES[self]

    @property
    def element_bytes(self) -> int:
        return self.torch_dtype.itemsize


_TORCH_DTYPES = {
    EngineDtype.BF16: torch.bfloat16,
    EngineDtype.FP16: torch.float16,
    EngineDtype.FP32: torch.float32,
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine. Raises SetupError for values that cannot work."""

    model_dir: Path
    dtype: EngineDtype = EngineDtype.BF16
    device: str | None = None
    """`cuda`, `cpu`, or None for cuda where there is one."""
    block_size: int = 16
    num_blocks: int = 2048
    max_model_len: int | None = None
    """Shortens the model's own context; None keeps it."""
    max_batched_tokens: int = 4096
    """Tokens computed in one step at most."""
    max_prefill_tokens_beside_decode: int = 1024
    """Prompt tokens computed in a step in which other requests wait for their next token."""
    max_running: int = 64
    max_waiting: int = 256
    num_threads: int | None = None
    """Threads per operation; None keeps torch's choice."""
    prefix_caching: bool = True
    load_ahead_requests: int = 4
    """Waiting requests whose blocks are loaded before their turn; 0 for none."""
    load_ahead_bytes: int = 512 * 1024 * 1024
    """Of their blocks together."""

    def __post_init__(self) -> None:
        names = ("block_size", "num_blocks", "max_batched_tokens", "max_prefill_tokens_beside_decode", "max_running")
        wrong = [name for name in (*names, "max_waiting") if getattr(self, name) < 1]
        wrong += [name for name in ("max_model_len", "num_threads") if (getattr(self, name) or 1) < 1]
        if wrong:
            raise SetupError(f"Engine settings must be at least 1: {', '.join(wrong)}.")
        if self.load_ahead_requests < 0 or self.load_ahead_bytes < 0:
            raise SetupError("Engine settings must not be negative: load_ahead_requests, load_ahead_bytes.")

    @property
    def torch_device(self) -> torch.device:
        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)
