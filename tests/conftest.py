"""Fixtures that several packages' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings

from stratakv import migrate
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import PostgresSettings

_database_numbers = count()

# A machine may be busy: how long an example takes says nothing. Fixtures that examples share are meant to be shared.
settings.register_profile(
    "stratakv",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("stratakv")

_ALONE = (
    "tests/integration/fleet/",
    "tests/integration/test_",
    "tests/integration/meta_server/test_chaos.py",
    "tests/vllm/",
    "tests/debian/",
)
"""Tests with many processes, of which several at a time would be too much for a machine."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, the tests of a file stay together, and those with many processes run one after the other."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "alone" if nodeid.startswith(_ALONE) else str(super()._split_scope(nodeid))

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A throw-away PostgreSQL for the whole run."""
    with EmbeddedPostgres(PostgresSettings(), tmp_path_factory.mktemp("pg"), throw_away=True) as cluster:
        yield cluster


@pytest.fixture
def postgres_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """URL, as superuser, of an empty database of the test's own."""
    with _database(postgres) as url:
        yield url


@pytest.fixture(scope="session")
def migrated_template(postgres: EmbeddedPostgres) -> str:
    """Name of a database with the newest schema, to copy: that is quicker than to migrate one more."""
    name = "migrated_template"
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    migrate.upgrade(postgres.database_url(name))
    return name


@pytest.fixture
def migrated_url(postgres: EmbeddedPostgres, migrated_template: str) -> Iterator[str]:
    """URL, as superuser, of a database of the test's own with the newest schema."""
    with _database(postgres, migrated_template) as url:
        yield url


@contextmanager
def _database(postgres: EmbeddedPostgres, template: str = "template1") -> Iterator[str]:
    name = f"test_{next(_database_numbers)}"
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield postgres.database_url(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
