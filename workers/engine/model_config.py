"""A Hugging Face `config.json` of the Llama family, read into what the engine needs.

The members of the family differ in a few points only: Qwen2 has biases on q, k and v, Qwen3 normalises each query and key
head, Mistral may have a sliding window (the context is then shortened to it, within which nothing slides).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stratakv.errors import SetupError
from stratakv.layout import KVLayout
from workers.engine.config import EngineDtype
from workers.engine.rope import RopeConfig

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a model."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    rms_norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rest of the worker may know of the running model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    dtype: EngineDtype

    def kv_layout(self, block_size: int) -> KVLayout:
        """Layout of a page of `block_size` tokens outside the engine."""
        return KVLayout.for_attention(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_tokens=block_size,
            dtype=self.dtype,
            element_bytes=self.dtype.element_bytes,
        )


def read_model_config(directory: Path, max_model_len: int | None = None) -> ModelConfig:
    """Read `config.json` and `generation_config.json`. Raises SetupError for models the engine cannot run rightly."""
    raw = _read_json(directory / "config.json")
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in _ARCHITECTURES:
        raise SetupError(
            f"{directory} is a {architecture}; this engine runs {', '.join(_ARCHITECTURES)}.",
            hint="Serve other models with vLLM or SGLang and their StrataKV connector.",
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise SetupError(f"{directory}: activation {raw['hidden_act']!r} is not supported, only silu.")
    try:
        return _model_config(raw, architecture, _eos_token_ids(raw, directory), max_model_len)
    except KeyError as error:
        raise SetupError(f"{directory / 'config.json'} lacks {error}.") from error


def _model_config(
    raw: Mapping[str, Any], architecture: str, eos: frozenset[int], max_model_len: int | None
) -> ModelConfig:
    num_heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // num_heads
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        vocab_size=raw["vocab_size"],
        max_model_len=_context(raw, max_model_len),
        rms_norm_eps=raw["rms_norm_eps"],
        rope=RopeConfig.from_model(raw, head_dim),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        output_bias=architecture != "Qwen2ForCausalLM" and attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        eos_token_ids=eos,
    )


def _context(raw: Mapping[str, Any], wanted: int | None) -> int:
    limits = [int(raw["max_position_embeddings"])]
    if raw.get("use_sliding_window", True) and raw.get("sliding_window"):
        limits.append(int(raw["sliding_window"]))
    return min(limits if wanted is None else [*limits, wanted])


def _eos_token_ids(raw: Mapping[str, Any], directory: Path) -> frozenset[int]:
    path = directory / "generation_config.json"
    value = _read_json(path).get("eos_token_id") if path.is_file() else None
    value = raw.get("eos_token_id") if value is None else value
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list) else [value])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise SetupError(f"{path} is not a JSON object.")
    return value
