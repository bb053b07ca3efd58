"""The wheel carries all that the programs need, also where nothing can be compiled; a checkout has the same migrations."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from stratakv import migrate
from tests.unit.test_repository_rules import ROOT, tracked_names

PACKAGES = ("stratakv", "dbnode", "meta_server", "dmp", "workers", "migrations", "benchmarks")


def can_compile() -> bool:
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    return shutil.which(compiler) is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


EXTENSIONS = {"stratakv/_native/_moves.abi3.so", "workers/engine/kernels/_kernels.abi3.so"}
NO_COMPILER = {"CC": "false", "CXX": "false"}


def wheel_names(directory: Path, environment: dict[str, str]) -> set[str]:
    """The files in a wheel of what git knows."""
    source, target = directory / "source", directory / "wheel"
    for name in tracked_names():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    target.mkdir()
    subprocess.run(
        [sys.executable, "-c", BUILD, str(target)],
        cwd=source,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        timeout=100,
    )
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected_names() -> set[str]:
    return {name for name in tracked_names() if name.split("/", 1)[0] in PACKAGES and (ROOT / name).is_file()}


def test_every_file_of_every_package_is_in_the_wheel_and_nothing_else(tmp_path: Path) -> None:
    expected = expected_names()
    assert wheel_names(tmp_path, NO_COMPILER) == expected
    for name in ("migrations/alembic.ini", "migrations/script.py.mako", "stratakv/py.typed", "dbnode/queries.sql"):
        assert name in expected


@pytest.mark.skipif(not can_compile(), reason="there is no C++ compiler, or Python's headers are not installed")
def test_the_wheel_has_the_extensions_where_there_is_a_compiler(tmp_path: Path) -> None:
    assert wheel_names(tmp_path, {}) == expected_names() | EXTENSIONS


def test_alembic_can_be_called_by_hand_in_a_checkout() -> None:
    command = [sys.executable, "-m", "alembic", "-c", "alembic.ini", "history"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert f"{migrate.head()} (head)" in done.stdout
