"""An empty database on the embedded PostgreSQL and on the distribution's, and what its schema has in it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import psycopg
import pytest

from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import PostgresSettings

DEBIAN_BIN = Path("/usr/lib/postgresql/15/bin")
_numbers = count()


@pytest.fixture(scope="session", params=["embedded", pytest.param("debian", marks=pytest.mark.debian)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    if request.param == "embedded":
        yield request.getfixturevalue("postgres")
        return
    if not (DEBIAN_BIN / "postgres").exists():
        pytest.skip("no PostgreSQL of the distribution here")
    settings = PostgresSettings(bin=DEBIAN_BIN)
    with EmbeddedPostgres(settings, tmp_path_factory.mktemp("debian"), throw_away=True) as cluster:
        yield cluster


@pytest.fixture
def url(server: EmbeddedPostgres) -> Iterator[str]:
    """URL, as superuser, of an empty database."""
    name = f"migrations_{next(_numbers)}"
    with psycopg.connect(server.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield server.database_url(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
