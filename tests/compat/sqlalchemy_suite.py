"""SQLAlchemy's suite for dialects, from its installed package, with psycopg and with asyncpg."""

from __future__ import annotations

from pathlib import Path

import psycopg

from tests.compat.outcomes import Results
from tests.compat.pytest_run import run_pytest
from tests.compat.sources import python_package
from tests.compat.target import Target

_CONFTEST = """
import pytest
pytest.register_assert_rewrite("sqlalchemy.testing.assertions")
from sqlalchemy.testing.plugin.pytestplugin import *
"""
_SETUP = """
[tool:pytest]
python_files = test_suite.py
[sqla_testing]
requirement_cls = sqlalchemy.testing.requirements:SuiteRequirements
profile_file = profiles.txt
[db]
default = {url}
"""


def run_psycopg(target: Target, directory: Path) -> Results:
    return _run(target, directory, "psycopg")


def run_asyncpg(target: Target, directory: Path) -> Results:
    return _run(target, directory, "asyncpg")


def _run(target: Target, directory: Path, driver: str) -> Results:
    with psycopg.connect(target.url(), autocommit=True) as connection:
        # What the suite's authors ask of a test database.
        connection.execute("CREATE SCHEMA test_schema")
        connection.execute("CREATE EXTENSION IF NOT EXISTS hstore")
        connection.execute(f"ALTER DATABASE {target.database} SET default_text_search_config = 'pg_catalog.english'")
    (directory / "conftest.py").write_text(_CONFTEST)
    (directory / "test_suite.py").write_text("from sqlalchemy.testing.suite import *\n")
    (directory / "setup.cfg").write_text(_SETUP.format(url=target.url(f"postgresql+{driver}")))
    # SQLAlchemy drives asyncpg by greenlets.
    environment = {"PYTHONPATH": str(python_package("greenlet"))} if driver == "asyncpg" else {}
    return run_pytest(directory, ["test_suite.py", "-p", "no:asyncio"], environment)
