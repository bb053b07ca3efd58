"""The schema goes up, down and up again, as SQL too, one migration at a time; and each release knows what it may work on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from stratakv import migrate
from stratakv.errors import SetupError
from stratakv.postgres.binaries import find_binaries
from tests.meta_process import ROOT

TIMEOUT_S = 60


def tables(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'stratakv'").fetchall()
    return {row[0] for row in rows}


def set_version(url: str, revision: str, floor: str | None) -> None:
    """As a release of the future would have left it."""
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE stratakv.schema_version SET version_num = %s, compatible = %s", (revision, floor))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STRATAKV_")}
    line = [sys.executable, "-m", "stratakv.cli", "migrate", *arguments]
    return subprocess.run(line, cwd=ROOT, env=inherited, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def run_psql(url: str, script: str) -> subprocess.CompletedProcess[str]:
    line = [find_binaries(None).program("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", url]
    return subprocess.run(line, input=script, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@contextmanager
def lock_held(url: str, statement: str) -> Iterator[None]:
    """In a transaction of somebody else's."""
    with psycopg.connect(url) as connection:
        connection.execute(statement)
        yield
        connection.rollback()


def test_up_down_and_up_again(url: str) -> None:
    with pytest.raises(SetupError, match=r"revision none.*stratakv migrate upgrade"):
        migrate.check(url)
    migrate.upgrade(url)
    assert migrate.check(url).current == migrate.head()
    first = tables(url)
    assert {"tenants", "nodes", "segments", "workers", "put_sessions", "blocks", "replicas", "usage_events"} <= first
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT name FROM stratakv.tenants").fetchall() == [("default",)]
    migrate.downgrade(url, "base")
    assert tables(url) == {"schema_version"}
    migrate.upgrade(url)
    assert tables(url) == first
    assert [r.is_current for r in migrate.history(url)][-1]


def test_psql_applies_the_printed_sql_from_wherever_the_database_is(url: str) -> None:
    migrate.upgrade(url, "0003")
    script = command("upgrade", "--sql", "--database", url).stdout
    done = run_psql(url, script)
    assert done.returncode == 0, done.stderr
    migrate.check(url)
    all_tables = tables(url)
    again = run_psql(url, script)
    assert again.returncode != 0
    assert "begins at revision 0003" in again.stderr
    back = run_psql(url, command("downgrade", "base", "--sql", "--database", url).stdout)
    assert back.returncode == 0, back.stderr
    assert tables(url) == {"schema_version"}
    from_nothing = run_psql(url, command("upgrade", "--sql").stdout)
    assert from_nothing.returncode == 0, from_nothing.stderr
    migrate.check(url)
    assert tables(url) == all_tables


def test_two_at_once_take_turns(url: str) -> None:
    line = [sys.executable, "-c", "import sys; from stratakv import migrate; migrate.upgrade(sys.argv[1])", url]
    processes = [subprocess.Popen(line, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=TIMEOUT_S) for process in processes] == [0, 0]
    migrate.check(url)


def test_a_migration_waits_so_long_for_another_one_and_then_says_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "TURN_TIMEOUT_S", 1)
    with (
        lock_held(url, f"SELECT pg_advisory_lock({migrate.ADVISORY_LOCK})"),
        pytest.raises(SetupError, match="another migration has been running for 1 s"),
    ):
        migrate.upgrade(url)
    migrate.upgrade(url)


def test_a_migration_does_not_wait_long_for_a_table_and_leaves_nothing_half_done(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_S", 1)
    migrate.upgrade(url, "0002")
    before = tables(url)
    with (
        lock_held(url, "LOCK TABLE stratakv.segments IN ACCESS SHARE MODE"),
        pytest.raises(SetupError, match="holds a lock that the migration needs"),
    ):
        migrate.upgrade(url)
    assert migrate.current(url) == "0002"
    assert tables(url) == before


def test_a_role_that_may_not_is_told_without_a_traceback(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS visitor")
        admin.execute("CREATE ROLE visitor LOGIN")
    done = command("upgrade", "--database", url.replace("postgres@", "visitor@", 1))
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("DROP ROLE visitor")
    assert done.returncode == 2, done.stderr
    assert "permission denied" in done.stderr
    assert "Traceback" not in done.stderr


def test_services_work_on_a_newer_schema_that_lets_them(url: str) -> None:
    migrate.upgrade(url)
    set_version(url, "9999", migrate.head())
    found = migrate.check(url)
    assert (found.current, found.is_newer) == ("9999", True)
    migrate.upgrade(url)  # as `stratakv up` of this release does: there is nothing to do
    assert migrate.current(url) == "9999"
    told = json.loads(command("current", "--json", "--database", url).stdout)
    assert told == {"current": "9999", "head": migrate.head(), "compatible": migrate.head(), "usable": True}


@pytest.mark.parametrize("floor", ["9998", None])
def test_services_refuse_a_newer_schema_that_does_not_let_them(url: str, floor: str | None) -> None:
    migrate.upgrade(url)
    set_version(url, "9999", floor)
    for refused in (migrate.check, migrate.upgrade, lambda url: migrate.downgrade(url, "0001")):
        with pytest.raises(SetupError, match="9999"):
            refused(url)
    done = command("check", "--database", url)
    assert done.returncode == 2
    assert "migrate downgrade" in done.stderr
    assert ("9998" in done.stderr) == (floor is not None)


def test_services_refuse_an_older_schema(url: str) -> None:
    migrate.upgrade(url, "0007")
    with pytest.raises(SetupError, match=r"0007.*run `stratakv migrate upgrade`"):
        migrate.check(url)


def test_going_back_restores_what_the_release_before_may_work_on(url: str) -> None:
    migrate.upgrade(url)
    migrate.downgrade(url, "0009")
    assert migrate.state(url).compatible == "0007"
    migrate.downgrade(url, "0008")
    assert migrate.state(url).compatible is None


def test_an_empty_revision_is_refused_and_changes_nothing(url: str) -> None:
    migrate.upgrade(url, "0003")
    for work in (migrate.upgrade, migrate.downgrade):
        with pytest.raises(SetupError, match="no revision is named"):
            work(url, " ")
    for printed in (migrate.upgrade_sql, migrate.downgrade_sql):
        with pytest.raises(SetupError, match="no revision is named"):
            printed("")
    assert migrate.current(url) == "0003"


def test_every_spelling_of_the_url_works(url: str) -> None:
    migrate.upgrade(url.replace("postgresql://", "postgres://"))
    migrate.check(url.replace("postgresql://", "postgresql+psycopg://"))


@pytest.mark.parametrize("url", ["mysql://h/d", "nonsense", "postgresql://u:hidden@127.0.0.1:1/d"])
def test_a_url_that_leads_nowhere_is_said_without_its_password(url: str) -> None:
    with pytest.raises(SetupError) as caught:
        migrate.check(url)
    assert "hidden" not in caught.value.message
