"""The schema goes up, down and up again, as SQL too, one migration at a time."""

from __future__ import annotations

import subprocess
import sys

import psycopg
import pytest

from stratakv import migrate
from stratakv.errors import SetupError
from tests.meta_process import ROOT


def tables(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'stratakv'").fetchall()
    return {row[0] for row in rows}


def test_up_down_and_up_again(postgres_url: str) -> None:
    with pytest.raises(SetupError, match=r"revision none.*stratakv migrate upgrade"):
        migrate.check(postgres_url)
    migrate.upgrade(postgres_url)
    migrate.check(postgres_url)
    first = tables(postgres_url)
    assert {"tenants", "nodes", "segments", "workers", "put_sessions", "blocks", "replicas", "usage_events"} <= first
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT name FROM stratakv.tenants").fetchall() == [("default",)]
    migrate.downgrade(postgres_url, "base")
    assert tables(postgres_url) == {"schema_version"}
    migrate.upgrade(postgres_url)
    assert tables(postgres_url) == first
    assert [r.is_current for r in migrate.history(postgres_url)][-1]


def test_the_printed_sql_does_the_same(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(migrate.upgrade_sql().encode())
    migrate.check(postgres_url)


def test_two_at_once_take_turns(postgres_url: str) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from stratakv import migrate; migrate.upgrade(sys.argv[1])",
        postgres_url,
    ]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    migrate.check(postgres_url)


def test_every_spelling_of_the_url_works(postgres_url: str) -> None:
    migrate.upgrade(postgres_url.replace("postgresql://", "postgres://"))
    migrate.check(postgres_url.replace("postgresql://", "postgresql+psycopg://"))


@pytest.mark.parametrize("url", ["mysql://h/d", "nonsense", "postgresql://u:hidden@127.0.0.1:1/d"])
def test_a_url_that_leads_nowhere_is_said_without_its_password(url: str) -> None:
    with pytest.raises(SetupError) as caught:
        migrate.check(url)
    assert "hidden" not in caught.value.message
