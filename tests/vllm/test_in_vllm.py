"""What is checked by scripts that run where vLLM is, against vLLM's own functions."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.vllm_process import VENV, vllm_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180)]
ROOT = Path(__file__).parents[2]


def test_salt_adapters_and_images_enter_computed_keys_as_they_enter_vllms(tmp_path: Path) -> None:
    assert_same("same_keys.py", tmp_path)


def test_groups_need_and_are_held_by_what_vllm_frees(tmp_path: Path) -> None:
    assert_same("same_groups.py", tmp_path)


def test_what_is_counted_is_served_with_vllms_metrics(tmp_path: Path) -> None:
    assert_same("same_metrics.py", tmp_path)


def assert_same(script: str, directory: Path) -> None:
    (directory / "stratakv").symlink_to(ROOT / "stratakv")
    done = subprocess.run(
        [VENV / "bin/python", Path(__file__).with_name(script)],
        env=vllm_environment(directory),
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.stdout.endswith("same\n"), done.stderr
