"""`stratakv usage`: the right sums, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from dbnode.generate import Outcome
from tests.integration.usage.conftest import event, write_now

Query = Callable[..., list[tuple[Any, ...]]]


def stratakv(*arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STRATAKV_")}
    line = [sys.executable, "-m", "stratakv.cli", "usage", *arguments]
    return subprocess.run(line, env=inherited, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def used(url: str, query: Query) -> str:
    write_now(url, event("a"), event("b", model="n"), event("c", "bolt"), event("d", "bolt", outcome=Outcome.UNUSED))
    query(
        "INSERT INTO stratakv.usage_daily SELECT '2026-02-28', id, 'm', 'sql', 3, 1, 1, 30, 0, 15, 0, 0, 6, 0, 0"
        " FROM stratakv.tenants WHERE name = 'acme'"
    )
    return url


def rows(url: str, *arguments: str) -> list[dict[str, Any]]:
    done = stratakv("--json", "--database", url, *arguments)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_sums_by_tenant_month_and_model(used: str) -> None:
    by_tenant = {row["tenant"]: row for row in rows(used)}
    assert (by_tenant["acme"]["requests"], by_tenant["acme"]["cached_tokens"]) == (5, 23)
    assert (by_tenant["bolt"]["requests"], by_tenant["bolt"]["unused_tokens"]) == (1, 15)
    by_both = rows(used, "--by", "month", "--by", "model", "--tenant", "acme", "--until", "2026-02")
    assert [(row["month"], row["model"], row["prompt_tokens"]) for row in by_both] == [("2026-02", "m", 30)]
    by_day = rows(used, "--by", "day", "--since", "2026-03-01", "--model", "n")
    assert [row["requests"] for row in by_day] == [1]


def test_people_get_a_table_with_a_line_for_all(used: str) -> None:
    done = stratakv("--database", used)
    assert done.returncode == 0, done.stderr
    lines = [line.replace("│", "").split() for line in done.stdout.splitlines()]
    assert ["all", "6", "1", "1", "60", "45.0", "%", "21", "1", "15"] in lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tenant", "nobody"), "no tenant 'nobody'"),
        (("--since", "yesterday"), "2026-03-01"),
        (("--by", "week"), "week"),
    ],
)
def test_what_cannot_be_is_said(used: str, arguments: tuple[str, ...], said: str) -> None:
    done = stratakv("--database", used, *arguments)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_without_the_tables_is_told_what_to_run(postgres_url: str) -> None:
    done = stratakv("--database", postgres_url)
    assert done.returncode == 2
    assert "stratakv migrate upgrade" in done.stderr
