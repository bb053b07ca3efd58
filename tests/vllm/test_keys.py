"""Keys that the connector computes itself are vLLM's own, by vLLM's own functions."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.vllm_process import VENV, vllm_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180)]
ROOT = Path(__file__).parents[2]


def test_salt_adapters_and_images_enter_computed_keys_as_they_enter_vllms(tmp_path: Path) -> None:
    (tmp_path / "stratakv").symlink_to(ROOT / "stratakv")
    done = subprocess.run(
        [VENV / "bin/python", Path(__file__).with_name("same_keys.py")],
        env=vllm_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.stdout.endswith("same\n"), done.stderr
