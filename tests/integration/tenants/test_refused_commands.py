"""`stratakv tenant | key | quota | usage` with what cannot be, databases that are none, and names that harm a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from typer.testing import CliRunner

from stratakv.cli import app, main
from stratakv.postgres import EmbeddedPostgres
from stratakv.tenancy.api_key import MARK

SECRET = f"{MARK}0a1b2c3d-{'s' * 43}"


@pytest.fixture(scope="module")
def untouched(postgres: EmbeddedPostgres, migrated_template: str) -> Iterator[str]:
    """A migrated database that no test changes."""
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE metadata_untouched TEMPLATE {migrated_template}".encode())
        yield postgres.database_url("metadata_untouched")
        connection.execute("DROP DATABASE metadata_untouched WITH (FORCE)")


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["tenant", "create", "default"], 1, "already"),
        *(
            (["tenant", "create", name], 1, "printable")
            for name in ("", " ", " a", "x" * 129, "a\x1b[31m", "a\nb", "a\u202eb")
        ),
        (["tenant", "update", "default"], 2, "nothing is named"),
        (["tenant", "update", "default", "--weight", "0"], 2, "--weight"),
        (["tenant", "update", "default", "--model", "any", "--model", "m"], 2, "stands alone"),
        (["tenant", "update", "default", "--model", "\x1b[2J"], 1, "printable"),
        (["tenant", "update", "default", "--network", "10.0.0.1/8"], 2, "expected a network"),
        (["tenant", "delete", "default"], 1, "cannot be deleted"),
        (["tenant", "audit", "--limit", "-1"], 2, "--limit"),
        (["tenant", "map-role", "default", "nobody"], 1, "no role nobody"),
        (["tenant", "unmap-role", "nobody"], 1, "no role nobody"),
        *((["tenant", word, "nobody"], 1, "no tenant nobody") for word in ("show", "delete", "roles", "audit")),
        (["key", "list", "nobody"], 1, "no tenant nobody"),
        *(
            (["key", "create", "default", "--expires", time], 2, "expected a time")
            for time in ("", "-1d", "2020-01-01")
        ),
        *((["key", "create", "default", "--expires", time], 1, "at most 100 years") for time in ("0", "99999999999d")),
        (["key", "rotate", SECRET, "--grace", "99999999999d"], 1, "at most 100 years"),
        *((["key", word, SECRET], 1, f"no key {MARK}0a1b2c3d") for word in ("revoke", "rotate")),
        (["quota", "set", "default"], 2, "nothing is named"),
        *(
            (["quota", "set", "default", "--parallel", text], 2, "expected a number")
            for text in ("-1", "1.5", "³", "٣", "")
        ),
        (["quota", "set", "default", "--parallel", "9" * 30], 1, "1,000,000,000,000"),
        (["quota", "set", "default", "--cache-memory", "99999999999TiB"], 1, "cache_memory_bytes is"),
        (["quota", "set", "default", "--cached-ratio", "nan"], 2, "--cached-ratio"),
        (["quota", "show", "nobody"], 1, "no tenant nobody"),
        (["usage", "--since", "2026-05", "--until", "2026-01"], 2, "is later than"),
    ],
)
def test_what_cannot_be_is_refused_with_its_exit_status_and_changes_nothing(
    untouched: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    told: str,
) -> None:
    with psycopg.connect(untouched) as connection:
        before = connection.execute("SELECT count(*) FROM stratakv.audit_log").fetchone()
    monkeypatch.setattr("sys.argv", ["stratakv", *arguments, "--database", untouched])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (status, "")
    assert told in " ".join(said.err.split())
    assert SECRET not in said.err
    assert "\x1b" not in said.err
    with psycopg.connect(untouched) as connection:
        assert connection.execute("SELECT count(*) FROM stratakv.audit_log").fetchone() == before


def test_a_database_without_metadata_is_told_from_one_that_is_away(
    postgres_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url, told in (
        (postgres_url, "stratakv migrate upgrade"),
        ("postgresql://u:hidden@127.0.0.1:1/d", "cannot connect"),
    ):
        for arguments in (["tenant", "list"], ["key", "list"], ["quota", "list"], ["tenant", "create", "x"]):
            monkeypatch.setattr("sys.argv", ["stratakv", *arguments, "--database", url])
            with pytest.raises(SystemExit) as ended:
                main()
            said = capsys.readouterr().err
            assert ended.value.code == 2
            assert told in said
            assert "hidden" not in said


def test_names_that_were_written_by_hand_do_not_steer_the_terminal(metadata: str) -> None:
    name = "\x1b[2Jbad\x07\u202e"
    with psycopg.connect(metadata) as connection:
        connection.execute("SELECT set_config('stratakv.actor', %s, true)", (name,))
        row = connection.execute("INSERT INTO stratakv.tenants (name) VALUES (%s) RETURNING id", (name,)).fetchone()
        assert row is not None
        connection.execute(
            "INSERT INTO stratakv.api_keys (tenant_id, name, prefix, key_hash, models) VALUES (%s, %s, %s, '\\x00', %s)",
            (row[0], name, name, [name]),
        )
        connection.execute("INSERT INTO stratakv.tenant_roles VALUES ('1', %s, 1, %s)", (name, row[0]))
        connection.execute(
            "INSERT INTO stratakv.usage_events (request_id, tenant_id, model, source, outcome)"
            " VALUES ('r', %s, %s, 'sql', 'completed')",
            (row[0], name),
        )
    for command in (
        *("tenant list", "tenant audit", "tenant roles", "key list", "quota list", "usage", "usage --by model"),
        *("tenant show NAME", "key revoke NAME", "tenant delete NAME"),
    ):
        arguments = [name if word == "NAME" else word for word in command.split()]
        done = CliRunner().invoke(app, [*arguments, "--database", metadata], catch_exceptions=False)
        assert done.exit_code == 0
        assert all(c.isprintable() or c == "\n" for c in done.output), arguments
