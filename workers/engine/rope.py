"""Rotary position embedding: angles of every position, computed once, and their application to query and key heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stratakv.errors import SetupError


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the low frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Base, linear scaling factor and optional Llama 3 scaling."""

    head_dim: int
    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None

    @classmethod
    def from_model(cls, raw: Mapping[str, Any], head_dim: int) -> RopeConfig:
        """Read either spelling of `config.json`: `rope_parameters`, or `rope_theta` with `rope_scaling`."""
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "default":
            return cls(head_dim, theta)
        if kind == "linear":
            return cls(head_dim, theta, linear_factor=float(rope["factor"]))
        if kind == "llama3":
            scaling = Llama3Scaling(
                float(rope["factor"]),
                float(rope["low_freq_factor"]),
                float(rope["high_freq_factor"]),
                int(rope["original_max_position_embeddings"]),
            )
            return cls(head_dim, theta, llama3=scaling)
        raise SetupError(f"Rotary scaling {kind!r} is not supported; default, linear and llama3 are.")


class RotaryEmbedding:
    """Cosines and sines of all positions, fp32, [max_positions, head_dim / 2]."""

    def __init__(self, config: RopeConfig, max_positions: int, device: torch.device) -> None:
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / (config.theta ** (half / config.head_dim)) / config.linear_factor
        if config.llama3 is not None:
            frequencies = _llama3_frequencies(frequencies, config.llama3)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        self.cosines, self.sines = angles.cos().to(device), angles.sin().to(device)
        self.device = device

    def at(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of `positions`, each [num_tokens, head_dim / 2]."""
        index = torch.tensor(positions, device=self.device)
        return self.cosines[index], self.sines[index]


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rotate fp32 `heads` [num_tokens, num_heads, head_dim]; the result is a new tensor of `dtype`."""
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.empty(heads.shape, dtype=dtype, device=heads.device)
    out_first, out_second = rotated.chunk(2, dim=-1)
    out_first.copy_(torch.addcmul(first * cos, second, sin, value=-1.0))
    out_second.copy_(torch.addcmul(second * cos, first, sin))
    return rotated


def _llama3_frequencies(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    smooth = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelengths > low, frequencies / scaling.factor, between)
    return torch.where(wavelengths < high, frequencies, stretched)
