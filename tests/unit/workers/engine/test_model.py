"""Logits equal those of transformers for every architecture of the family, and a wrong model is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from stratakv.errors import SetupError
from tests.unit.workers.engine.harness import TINY, Oracle, prompt, save_tiny
from workers.engine.attention_parts import AttentionPart
from workers.engine.block_table import Run
from workers.engine.config import EngineDtype
from workers.engine.forward_batch import ForwardBatch
from workers.engine.kv_cache import KVCache
from workers.engine.model import Model

CPU = torch.device("cpu")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class NoHooks:
    is_idle = True

    def before_attention(self, layer: int) -> None:
        pass

    def after_write(self, layer: int) -> None:
        pass


def logits(model: Model, token_ids: list[int]) -> torch.Tensor:
    """Of all tokens, in one forward."""
    cache, count = KVCache(model.facts, 16, 16, CPU), len(token_ids)
    rows = list(range(count))
    batch = ForwardBatch(token_ids, rows, [Run(0, count)], [AttentionPart(0, count, (Run(0, count),))], rows)
    return model.forward(batch, cache, NoHooks())


CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "llama, tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "llama, llama3 rope": LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE),
    "llama, linear rope": LlamaConfig(
        **TINY, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama, wide heads": LlamaConfig(**TINY, head_dim=24),
    "mistral": MistralConfig(**TINY, sliding_window=256),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=32),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    directory = save_tiny(tmp_path, CONFIGS[name])
    token_ids = prompt(7, 90)
    with torch.inference_mode():
        expected = Oracle(directory).model(torch.tensor([token_ids])).logits[0]
    ours = logits(Model(directory, EngineDtype.FP32, CPU), token_ids)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [EngineDtype.BF16, EngineDtype.FP16])
def test_logits_of_half_the_bits_stay_near(tiny: Path, dtype: EngineDtype) -> None:
    token_ids = prompt(7, 60)
    exact = logits(Model(tiny, EngineDtype.FP32, CPU), token_ids)
    rounded = logits(Model(tiny, dtype, CPU), token_ids)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_sliding_window_shortens_the_context(tmp_path: Path) -> None:
    model = Model(save_tiny(tmp_path, CONFIGS["mistral"]), EngineDtype.FP32, CPU)
    assert model.facts.max_model_len == 256


def test_facts_describe_the_pages(tiny: Path) -> None:
    facts = Model(tiny, EngineDtype.BF16, CPU, max_model_len=100).facts
    layout = facts.kv_layout(16)
    assert facts.max_model_len == 100
    assert facts.eos_token_ids == {2}
    assert len(layout.layers) == facts.num_layers == 3
    assert layout.data_bytes == 3 * 2 * 16 * facts.num_kv_heads * facts.head_dim * 2


def edit_weights(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(lambda t: t.pop("model.norm.weight"), "lacks the tensor model.norm.weight", id="missing"),
        pytest.param(lambda t: t.update(extra=torch.zeros(1)), "does not know: extra", id="unknown"),
        pytest.param(lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "has shape", id="other shape"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path, edit: Any, message: str) -> None:
    edit_weights(save_tiny(tmp_path), edit)
    with pytest.raises(SetupError, match=message):
        Model(tmp_path, EngineDtype.FP32, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_a_config_that_would_run_wrongly_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = save_tiny(tmp_path) / "config.json"
    raw = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    with pytest.raises(SetupError, match=message):
        Model(tmp_path, EngineDtype.FP32, CPU)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save_tiny(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SetupError, match="whole"):
        Model(tmp_path, EngineDtype.FP32, CPU)
