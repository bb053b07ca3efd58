"""asyncpg's own tests, from the source package of the version that is installed."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from tests.compat.outcomes import Results
from tests.compat.pytest_run import run_pytest
from tests.compat.sources import python_package, python_source
from tests.compat.target import Target

_LEFT_OUT = ("test__sourcecode.py", "test__environment.py")
"""They check asyncpg's source and its build."""


def run(target: Target, directory: Path) -> Results:
    """Tests that would start servers of their own are skipped by the suite itself, since it is given one."""
    source = python_source("asyncpg", importlib.metadata.version("asyncpg"))
    shutil.copytree(source / "tests", directory / "tests")
    ignored = [f"--ignore=tests/{name}" for name in _LEFT_OUT]
    # The copy has no asyncpg beside it: what is tested is the installed one.
    environment = target.libpq_environment() | {"PYTHONPATH": str(python_package("distro"))}
    return run_pytest(directory, ["tests", *ignored, "-p", "no:asyncio"], environment)
