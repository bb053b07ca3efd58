"""Models the engine's tests run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stratakv.models import DEFAULT_MODEL, pull
from tests.unit.workers.engine.harness import Oracle, save_tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny products gain nothing from threads, and tests run beside each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def oracle(tiny: Path) -> Oracle:
    return Oracle(tiny)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return pull(DEFAULT_MODEL, Path.home() / ".cache" / "stratakv")


@pytest.fixture(scope="session")
def tiny_with_nan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose token 0 is embedded as NaN."""
    directory = save_tiny(tmp_path_factory.mktemp("tiny_with_nan"))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    # untied, so that the poisoned row reaches only those who use the token
    tensors["model.embed_tokens.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return directory
