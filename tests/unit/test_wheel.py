"""The wheel carries all that the programs need; a checkout has the same migrations."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile

import pytest

from stratakv import migrate
from tests.unit.test_repository_rules import ROOT, tracked_names

PACKAGES = ("stratakv", "dbnode", "meta_server", "dmp", "workers", "migrations", "benchmarks")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files in a wheel of what git knows."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked_names():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD, str(target)], cwd=source, check=True, capture_output=True, timeout=60)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_file_of_every_package_is_in_the_wheel_and_nothing_else(wheel_names: set[str]) -> None:
    expected = {name for name in tracked_names() if name.split("/", 1)[0] in PACKAGES and (ROOT / name).is_file()}
    assert {name for name in wheel_names if ".dist-info/" not in name} == expected
    for name in ("migrations/alembic.ini", "migrations/script.py.mako", "stratakv/py.typed", "dbnode/queries.sql"):
        assert name in expected


def test_alembic_can_be_called_by_hand_in_a_checkout() -> None:
    command = [sys.executable, "-m", "alembic", "-c", "alembic.ini", "history"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert f"{migrate.head()} (head)" in done.stdout
