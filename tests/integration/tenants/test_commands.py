"""`stratakv tenant | key | quota`, and the log of what they change."""

from __future__ import annotations

import json
import os
import pwd
import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from stratakv.cli import app
from stratakv.errors import InvalidRequest
from stratakv.postgres import EmbeddedPostgres
from stratakv.tenancy.administration import Administration
from stratakv.tenancy.api_key import hash_of
from tests.unit.test_repository_rules import ROOT

Run = Callable[..., Any]


@pytest.fixture
def run(metadata: str) -> Run:
    """Runs a command, and gives what it printed as JSON."""

    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(app, [*arguments, "--database", metadata, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    return run


def test_a_tenant_is_created_with_a_salt_of_its_own_changed_and_deleted(run: Run, metadata: str) -> None:
    run("tenant", "create", "acme", "--weight", "300", "--permission", "infer", "--permission", "pin")
    run("tenant", "create", "other", "--model", "m1", "--network", "10.0.0.0/8", "--share-cache")
    with psycopg.connect(metadata) as connection:
        salts = dict(connection.execute("SELECT name, salt FROM stratakv.tenants").fetchall())
    assert salts["default"] == ""
    assert len({*salts.values()}) == 3
    acme, default, other = run("tenant", "list")
    assert (acme["name"], acme["weight"], acme["permissions"], acme["shares_cache"]) == (
        "acme",
        300,
        ["infer", "pin"],
        False,
    )
    assert (default["name"], default["shares_cache"]) == ("default", True)
    assert (other["models"], other["networks"], other["shares_cache"]) == (["m1"], ["10.0.0.0/8"], True)
    changed = run("tenant", "update", "other", "--model", "any", "--network", "any", "--own-cache", "--disable")
    assert (changed["models"], changed["networks"], changed["is_enabled"]) == (None, None, False)
    assert run("tenant", "delete", "other")["gone"]
    assert [one["name"] for one in run("tenant", "list")] == ["acme", "default"]


def test_a_tenant_with_usage_stays_for_it_and_its_name_stays_taken(
    run: Run, metadata: str, admin: Administration
) -> None:
    run("tenant", "create", "acme")
    run("key", "create", "acme")
    with psycopg.connect(metadata) as connection:
        connection.execute(
            "INSERT INTO stratakv.usage_events (request_id, tenant_id, model, source, outcome)"
            " SELECT 'r1', id, 'm', 'rest', 'completed' FROM stratakv.tenants WHERE name = 'acme'"
        )
    assert run("tenant", "delete", "acme")["gone"] is False
    assert [one["name"] for one in run("tenant", "list")] == ["default"]
    assert run("key", "list") == []
    assert [one["name"] for one in run("tenant", "list", "--deleted")] == ["acme", "default"]
    with pytest.raises(InvalidRequest):
        admin.create_tenant("acme", {})
    with pytest.raises(InvalidRequest):
        admin.delete_tenant("default")


def test_a_key_is_shown_once_and_kept_as_a_hash(run: Run, metadata: str) -> None:
    run("tenant", "create", "acme")
    made = run("key", "create", "acme", "--name", "ci", "--expires", "90d", "--permission", "infer")
    assert made["key"].startswith(made["prefix"])
    (listed,) = run("key", "list", "acme")
    assert (listed["prefix"], listed["name"], listed["state"]) == (made["prefix"], "ci", "valid")
    with psycopg.connect(metadata) as connection:
        (stored,) = connection.execute("SELECT key_hash FROM stratakv.api_keys").fetchone() or (None,)
        everything = connection.execute("SELECT a::text FROM stratakv.audit_log a").fetchall()
    assert stored == hash_of(made["key"])
    secret = made["key"].removeprefix(made["prefix"])
    assert not any(secret in str(row) or hash_of(made["key"]).hex() in str(row) for row in everything)


def test_a_rotated_key_goes_on_for_the_grace_and_a_revoked_one_does_not(run: Run) -> None:
    run("tenant", "create", "acme")
    first = run("key", "create", "acme", "--name", "ci", "--permission", "infer")
    second = run("key", "rotate", first["prefix"], "--grace", "1h")
    third = run("key", "rotate", second["prefix"], "--grace", "0")
    states = {one["prefix"]: one for one in run("key", "list")}
    assert states[first["prefix"]]["state"] == "valid"
    assert states[first["prefix"]]["expires_at"] is not None
    assert states[second["prefix"]]["state"] == "revoked"
    assert (states[third["prefix"]]["name"], states[third["prefix"]]["permissions"]) == ("ci", ["infer"])
    assert run("key", "revoke", third["prefix"])["state"] == "revoked"


def test_a_role_is_mapped_by_cluster_name_and_oid(run: Run, metadata: str, postgres: EmbeddedPostgres) -> None:
    run("tenant", "create", "acme")
    with psycopg.connect(metadata, autocommit=True) as connection:
        connection.execute("CREATE ROLE mapped_role LOGIN")
        try:
            mapped = run("tenant", "map-role", "acme", "mapped_role")
            oid = connection.execute("SELECT 'mapped_role'::regrole::oid").fetchone()
        finally:
            connection.execute("DROP ROLE mapped_role")
    assert (mapped["oid"],) == oid
    (listed,) = run("tenant", "roles", "acme")
    assert (listed["role"], listed["cluster"]) == ("mapped_role", mapped["cluster"])
    run("tenant", "unmap-role", "mapped_role")
    assert run("tenant", "roles") == []


def test_limits_are_set_one_by_one_and_taken_away(run: Run) -> None:
    run("tenant", "create", "acme")
    run("quota", "set", "acme", "--requests-per-minute", "60", "--cached-ratio", "0.25", "--cache-memory", "1GiB")
    run("quota", "set", "acme", "--tokens-per-month", "1000000")
    found = run("quota", "show", "acme")
    assert (found["requests_per_minute"], found["tokens_per_month"]) == (60, 1_000_000)
    assert (found["cached_token_micros"], found["cache_memory_bytes"]) == (250_000, 1024**3)
    run("quota", "set", "acme", "--requests-per-minute", "none")
    assert run("quota", "show", "acme")["requests_per_minute"] is None
    run("quota", "clear", "acme")
    assert [one["tokens_per_month"] for one in run("quota", "list")] == [None, None]


def test_every_change_is_in_the_log_also_one_made_by_hand(run: Run, metadata: str) -> None:
    run("tenant", "create", "acme")
    run("quota", "set", "acme", "--parallel", "4")
    with psycopg.connect(metadata) as connection:
        connection.execute("UPDATE stratakv.tenants SET weight = 7 WHERE name = 'acme'")
    by_hand, limits, *_, created = run("tenant", "audit", "acme")
    assert (by_hand["actor"], by_hand["before"]["weight"], by_hand["after"]["weight"]) == ("postgres", 100, 7)
    assert (limits["object"], limits["after"]["parallel_requests"]) == ("tenant_limits", 4)
    assert (created["object"], created["action"]) == ("tenants", "insert")
    assert "@" in created["actor"]
    assert "salt" not in created["after"]


def documented_fields() -> dict[str, set[str]]:
    """Of each command, from the reference."""
    text = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    rows = re.findall(r"^\| (`(?:tenant|key|quota) \w.*?) \| ([^|]*)\|$", text.partition("| fields |")[2], re.MULTILINE)
    fields = re.compile(r"`(\w+)`")
    return {
        name: {*fields.findall(re.sub(r"\(.*?\)", "", told))}
        for names, told in rows
        for name in re.findall(r"`([^`]*)`", names)
    }


def test_programs_get_the_fields_that_are_documented(run: Run, metadata: str) -> None:
    with psycopg.connect(metadata, autocommit=True) as connection:
        connection.execute("CREATE ROLE field_role LOGIN")
    try:
        told = {
            "tenant create": run("tenant", "create", "acme"),
            "tenant update": run("tenant", "update", "acme", "--weight", "7"),
            "tenant map-role": run("tenant", "map-role", "acme", "field_role"),
            "tenant roles": run("tenant", "roles")[0],
            "tenant unmap-role": run("tenant", "unmap-role", "field_role"),
            "tenant list": run("tenant", "list")[0],
            "tenant audit": run("tenant", "audit")[0],
            "key create": (key := run("key", "create", "acme")),
            "key rotate": run("key", "rotate", key["key"]),
            "key revoke": run("key", "revoke", key["prefix"]),
            "key list": run("key", "list", "acme")[0],
            "quota set": run("quota", "set", "acme", "--parallel", "2"),
            "quota list": run("quota", "list")[0],
            "quota show": run("quota", "show", "acme"),
            "tenant show": (shown := run("tenant", "show", "acme")),
            "quota clear": run("quota", "clear", "acme"),
            "tenant delete": run("tenant", "delete", "acme"),
        }
    finally:
        with psycopg.connect(metadata, autocommit=True) as connection:
            connection.execute("DROP ROLE field_role")
    wanted = documented_fields()
    wanted["tenant show"] |= wanted["tenant list"]
    assert {name: set(fields) for name, fields in told.items()} == wanted
    assert shown["quota"]["parallel_requests"] == 2


def test_who_is_in_the_log_of_changes_is_who_the_system_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, "somebody_else")
    run("tenant", "create", "acme")
    assert run("tenant", "audit", "acme")[0]["actor"].partition("@")[0] == pwd.getpwuid(os.getuid()).pw_name


def test_people_get_tables(metadata: str) -> None:
    for arguments in (("tenant", "list"), ("tenant", "audit"), ("tenant", "roles"), ("key", "list"), ("quota", "list")):
        done = CliRunner().invoke(app, [*arguments, "--database", metadata], catch_exceptions=False)
        assert done.exit_code == 0
        assert "tenant" in done.output
