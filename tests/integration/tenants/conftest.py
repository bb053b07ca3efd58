"""Databases with the metadata's schema, copied from a template, and an administration of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import psycopg
import pytest

from stratakv import migrate
from stratakv.postgres import EmbeddedPostgres
from stratakv.tenancy.administration import Administration

_numbers = count()


@pytest.fixture(scope="session")
def metadata_template(postgres: EmbeddedPostgres) -> str:
    name = f"metadata_template_{next(_numbers)}"
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    migrate.upgrade(postgres.database_url(name))
    return name


@pytest.fixture
def metadata(postgres: EmbeddedPostgres, metadata_template: str) -> Iterator[str]:
    """URL of a migrated database, the test's own."""
    name = f"metadata_{next(_numbers)}"
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {metadata_template}")
        yield postgres.database_url(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def admin(metadata: str) -> Iterator[Administration]:
    with Administration(metadata, "test") as opened:
        yield opened
