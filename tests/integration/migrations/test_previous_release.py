"""Services of the release before go on working while the schema is new already, and others are replaced one by one.

`tests/previous_release` has that release's statements as they were; whoever makes a release puts its own there.
"""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from stratakv import migrate
from tests.unit.test_repository_rules import ROOT

FOLDER = ROOT / "tests" / "previous_release"
REVISION = "0007"
"""What that release needs."""
FILES = sorted(FOLDER.glob("*.sql"))
Connection = psycopg.Connection[tuple[object, ...]]


def statements(path: Path) -> dict[str, str]:
    _, *parts = re.split(r"^-- name: (\w+)$", path.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def plan(connection: Connection, name: str, statement: str) -> None:
    """Let PostgreSQL read and plan a statement, with nothing done. Raises psycopg.Error."""
    connection.execute(f"PREPARE {name} AS {statement}".encode())
    row = connection.execute(
        "SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = %s", (name,)
    ).fetchone()
    assert row is not None
    nulls = ", ".join(["NULL"] * int(str(row[0])))
    connection.execute(f"EXPLAIN EXECUTE {name}{f'({nulls})' if nulls else ''}".encode())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_statement_of_the_release_before_is_understood(url: str, path: Path) -> None:
    migrate.upgrade(url)
    found = statements(path)
    assert found
    with psycopg.connect(url, autocommit=True) as connection:
        for name, statement in found.items():
            plan(connection, name, statement)


def test_usage_that_the_release_before_writes_is_counted_once(url: str) -> None:
    migrate.upgrade(url)
    insert = statements(FOLDER / "dbnode.sql")["insert_usage_events"]
    columns = [
        ["a", "b"],
        ["default"] * 2,
        ["m"] * 2,
        ["rest"] * 2,
        *[[8, 8]] * 6,
        ["completed"] * 2,
        *[[1.0, 2.0]] * 4,
    ]
    with psycopg.connect(url, autocommit=True) as connection:
        for _ in range(2):
            connection.execute(re.sub(r"\$(\d+)", "%s", insert).encode(), columns)
        assert connection.execute("SELECT count(*) FROM stratakv.usage_events").fetchone() == (2,)


def test_the_schema_says_that_the_release_before_may_work_on_it(url: str) -> None:
    migrate.upgrade(url)
    floor = migrate.state(url).compatible
    assert floor is not None
    assert floor <= REVISION
