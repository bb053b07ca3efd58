"""Writes a small model of random weights whose layers read either all of a prefix or a sliding window of it (Gemma 3's form)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WINDOW = 200
"""Tokens; more than one block, and no multiple of one."""
VOCABULARY = 512
HIDDEN = 64
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2


def write_hybrid_model(directory: Path) -> Path:
    """Configuration and weights; there is no tokenizer."""
    directory.mkdir()
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": len(LAYER_TYPES),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "query_pre_attn_scalar": HEAD_SIZE,
        "sliding_window": WINDOW,
        "layer_types": LAYER_TYPES,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_weights(torch.Generator().manual_seed(11)), directory / "model.safetensors")
    return directory


def _weights(rng: torch.Generator) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for n in range(len(LAYER_TYPES)):
        layer = f"model.layers.{n}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{layer}{norm}_layernorm"] = (HIDDEN,)
        for name in ("q", "k"):
            shapes[f"{layer}self_attn.{name}_norm"] = (HEAD_SIZE,)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{layer}self_attn.{name}_proj"] = (heads * HEAD_SIZE, HIDDEN)
        shapes[f"{layer}self_attn.o_proj"] = (HIDDEN, HEADS * HEAD_SIZE)
        for name in ("gate", "up"):
            shapes[f"{layer}mlp.{name}_proj"] = (2 * HIDDEN, HIDDEN)
        shapes[f"{layer}mlp.down_proj"] = (HIDDEN, 2 * HIDDEN)
    weights = {f"{name}.weight": torch.randn(shape, generator=rng) * 0.3 for name, shape in shapes.items()}
    # Small, so that what is said next follows from what was read, and not from the last token alone.
    weights["model.embed_tokens.weight"] *= 0.1
    return weights
