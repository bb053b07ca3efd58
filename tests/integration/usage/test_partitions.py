"""Usage by month: partitions are there ahead, old ones go, and one DB node at a time sees to it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import asyncpg
import psycopg
import pytest

from dbnode import usage_upkeep
from dbnode.usage_upkeep import MONTHS_AHEAD, UsageUpkeep
from stratakv.settings import DatabaseSettings, Secret, UsageSettings
from tests.integration.usage.conftest import event, write_now

Query = Callable[..., list[tuple[Any, ...]]]
BOUNDS = """
    SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'stratakv.usage_history'::regclass ORDER BY 1
"""
MONTHS = "SELECT to_char(now() AT TIME ZONE 'UTC' + i * interval '1 month', 'YYYY_MM') FROM generate_series(0, %s) i"


def tend(url: str, months_kept: int = 24) -> bool:
    return asyncio.run(UsageUpkeep(DatabaseSettings(url=Secret(url)), UsageSettings(months_kept)).tend())


def test_partitions_are_there_ahead_without_a_gap_and_without_a_default_one(url: str, query: Query) -> None:
    query("SELECT stratakv.make_usage_partitions(now() - interval '400 days', 14)")
    bounds = [text for _, text in query(BOUNDS)]
    assert not any("DEFAULT" in text for text in bounds)
    ends = [tuple(text.removeprefix("FOR VALUES FROM (").removesuffix(")").split(") TO (")) for text in bounds]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))
    assert query("SELECT stratakv.make_usage_partitions(now() - interval '400 days', 14)") == [(0,)]


def test_a_new_database_and_every_round_have_the_months_to_come(url: str, query: Query) -> None:
    wanted = {f"usage_history_{row[0]}" for row in query(MONTHS, MONTHS_AHEAD)}
    assert wanted <= {name for name, _ in query(BOUNDS)}
    for name in wanted:
        query(f"DROP TABLE stratakv.{name}")
    assert tend(url)
    assert wanted <= {name for name, _ in query(BOUNDS)}


def test_a_request_of_a_month_that_has_no_partition_is_not_taken_for_settled(url: str, query: Query) -> None:
    for name, _ in query(BOUNDS):
        query(f"DROP TABLE stratakv.{name}")
    write_now(url, event("a"))
    assert query("SELECT count(*) FROM stratakv.usage_events") == [(0,)]
    tend(url)
    write_now(url, event("a"))
    assert query("SELECT request_id FROM stratakv.usage_history") == [("a",)]


def test_months_past_their_time_go_and_their_sums_stay(url: str, query: Query) -> None:
    query("SELECT stratakv.make_usage_partitions(now() - interval '5 months', 3)")
    write_now(url, event("new"))
    query(
        "INSERT INTO stratakv.usage_events (request_id, tenant_id, model, source, prompt_tokens, outcome, created_at)"
        " SELECT 'old-' || i, 1, 'm', 'sql', 7, 'completed', now() - i * interval '1 month' FROM generate_series(1, 5) i"
    )
    before = query("SELECT * FROM stratakv.usage_daily ORDER BY day")
    assert tend(url, months_kept=0)
    assert query("SELECT count(*) FROM stratakv.usage_history") == [(6,)]
    assert tend(url, months_kept=3)
    kept = query("SELECT request_id FROM stratakv.usage_history ORDER BY request_id")
    assert kept == [("new",), ("old-1",), ("old-2",), ("old-3",)]
    assert query("SELECT * FROM stratakv.usage_daily ORDER BY day") == before


def test_what_settled_long_ago_is_cleared_and_stays_in_the_history(
    url: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_upkeep, "CLEARED_ROWS_MAX", 2)
    query("SELECT stratakv.make_usage_partitions(now() - interval '2 months', 3)")
    query(
        "INSERT INTO stratakv.usage_events (request_id, tenant_id, model, source, outcome, created_at)"
        " SELECT i::text, 1, 'm', 'sql', 'completed', now() - i * interval '1 day' FROM generate_series(5, 12) i"
    )
    tend(url)
    left = query("SELECT request_id FROM stratakv.usage_events ORDER BY request_id::integer")
    assert left == [("5",), ("6",), ("7",)]
    assert query("SELECT count(*) FROM stratakv.usage_history") == [(8,)]


def test_while_one_db_node_is_at_it_others_leave_it_alone(url: str) -> None:
    with psycopg.connect(url) as other:
        other.execute("SELECT pg_advisory_lock(%s)", (usage_upkeep.ADVISORY_LOCK,))
        assert not tend(url)
    assert tend(url)


def test_a_long_look_at_the_history_does_not_hold_up_what_is_written(
    url: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_upkeep, "LOCK_TIMEOUT_S", 1)
    query("SELECT stratakv.make_usage_partitions(now() - interval '5 months', 3)")
    with psycopg.connect(url) as reader:
        reader.execute("SELECT count(*) FROM stratakv.usage_history")
        with pytest.raises(asyncpg.LockNotAvailableError):
            tend(url, months_kept=1)
        write_now(url, event("meanwhile"))
        assert query("SELECT request_id FROM stratakv.usage_events") == [("meanwhile",)]
    assert tend(url, months_kept=1)
