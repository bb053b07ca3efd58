"""A pulled model is an ordinary Hugging Face directory, found again without the network, and named by its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from stratakv.errors import SetupError
from stratakv.models import DEFAULT_MODEL, list_models, model_identity, pull, resolve

CACHE_DIR = Path.home() / ".cache" / "stratakv"


@pytest.fixture
def local_model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    save_file({"w": zeros(4)}, directory / "model.safetensors")
    return directory


def test_a_missing_model_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as raised:
        resolve(DEFAULT_MODEL, tmp_path)
    assert f"stratakv model pull {DEFAULT_MODEL}" in (raised.value.hint or "")


@pytest.mark.parametrize("name", ["../x/y", "hf://../../etc", "hf://one", "", "smollm2"])
def test_a_name_never_leaves_the_cache_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(SetupError):
        resolve(name, tmp_path)


def test_a_local_directory_is_used_where_it_lies(tmp_path: Path, local_model: Path) -> None:
    assert pull(str(local_model), tmp_path) == local_model
    assert resolve(str(local_model), tmp_path) == local_model
    assert list_models(tmp_path) == []


def test_identity_changes_with_the_weights_and_only_then(local_model: Path) -> None:
    before = model_identity(local_model)
    assert model_identity(local_model) == before
    save_file({"w": zeros(4) + 1}, local_model / "model.safetensors")
    after = model_identity(local_model)
    assert after.revision != before.revision
    assert after.tokenizer_digest == before.tokenizer_digest


def test_a_damaged_identity_file_is_computed_anew(local_model: Path) -> None:
    before = model_identity(local_model)
    (local_model / "stratakv.json").write_text('{"revision": 1')
    assert model_identity(local_model) == before
    assert json.loads((local_model / "stratakv.json").read_text())["revision"] == before.revision


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="holds no model"):
        model_identity(tmp_path)


def test_the_default_model_loads_in_transformers_and_splits_digits() -> None:
    from transformers import AutoTokenizer

    directory = pull(DEFAULT_MODEL, CACHE_DIR)
    assert DEFAULT_MODEL in list_models(CACHE_DIR)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    text = "naïve été 🎉 don't <|im_start|>x\n\n  y"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
