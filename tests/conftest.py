"""Fixtures that several packages' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import psycopg
import pytest
from hypothesis import HealthCheck, settings

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


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A throw-away PostgreSQL for the whole run."""
    with EmbeddedPostgres(PostgresSettings(), tmp_path_factory.mktemp("pg"), throw_away=True) as cluster:
        yield cluster


@pytest.fixture
def postgres_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """URL, as superuser, of an empty database of the test's own."""
    name = f"test_{next(_database_numbers)}"
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield postgres.database_url(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
