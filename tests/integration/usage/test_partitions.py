"""Usage by month: partitions are there ahead, old ones go, and one DB node at a time sees to it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import asyncpg
import psycopg
import pytest
from prometheus_client import CollectorRegistry

from dbnode import upkeep
from dbnode.metrics import UpkeepMetrics
from dbnode.upkeep import MONTHS_AHEAD, Upkeep
from stratakv.settings import DatabaseSettings, Secret, TenantSettings, UsageSettings
from tests.integration.usage.conftest import event, write_now
from tests.support import eventually_async

Query = Callable[..., list[tuple[Any, ...]]]
BOUNDS = """
    SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'stratakv.usage_history'::regclass ORDER BY 1
"""
MONTHS = "SELECT to_char(now() AT TIME ZONE 'UTC' + i * interval '1 month', 'YYYY_MM') FROM generate_series(0, %s) i"


def upkeep_of(url: str, registry: CollectorRegistry, months_kept: int = 24, audit_months_kept: int = 24) -> Upkeep:
    tenants = TenantSettings(audit_months_kept=audit_months_kept)
    return Upkeep(DatabaseSettings(url=Secret(url)), UsageSettings(months_kept), tenants, UpkeepMetrics(registry))


def tend(url: str, **kept: int) -> bool:
    return asyncio.run(upkeep_of(url, CollectorRegistry(), **kept).tend())


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
    monkeypatch.setattr(upkeep, "CLEARED_ROWS_MAX", 2)
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
        other.execute("SELECT pg_advisory_lock(%s)", (upkeep.ADVISORY_LOCK,))
        assert not tend(url)
    assert tend(url)


def test_a_long_look_at_the_history_does_not_hold_up_what_is_written(
    url: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LOCK_TIMEOUT_S", 1)
    query("SELECT stratakv.make_usage_partitions(now() - interval '5 months', 3)")
    with psycopg.connect(url) as reader:
        reader.execute("SELECT count(*) FROM stratakv.usage_history")
        with pytest.raises(asyncpg.LockNotAvailableError):
            tend(url, months_kept=1)
        write_now(url, event("meanwhile"))
        assert query("SELECT request_id FROM stratakv.usage_events") == [("meanwhile",)]
    assert tend(url, months_kept=1)


def test_the_log_of_changes_is_kept_for_so_many_whole_months(
    url: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "CLEARED_ROWS_MAX", 2)
    query("DELETE FROM stratakv.audit_log")
    query(
        "INSERT INTO stratakv.audit_log (at, actor, action, object)"
        " SELECT date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' - i * interval '1 month', i::text, 'a', 'o'"
        " FROM generate_series(0, 7) i"
    )
    assert tend(url, audit_months_kept=0)
    assert query("SELECT count(*) FROM stratakv.audit_log") == [(8,)]
    assert tend(url, audit_months_kept=2)
    assert query("SELECT actor FROM stratakv.audit_log ORDER BY actor") == [("0",), ("1",), ("2",)]


def told(registry: CollectorRegistry, name: str) -> float:
    value = registry.get_sample_value(f"stratakv_{name}")
    assert value is not None
    return value


def test_what_is_made_dropped_and_deleted_is_counted_and_how_far_ahead_partitions_are_is_told(
    url: str, query: Query
) -> None:
    registry = CollectorRegistry()
    rounds = upkeep_of(url, registry, months_kept=3, audit_months_kept=1)
    assert told(registry, "usage_partitions_days_ahead") == 0
    query("SELECT stratakv.make_usage_partitions(now() - interval '5 months', 3)")
    query("UPDATE stratakv.audit_log SET at = now() - interval '3 months'")
    names = [name for name, _ in query(BOUNDS)]
    query(f"DROP TABLE stratakv.{names[-1]}")
    assert asyncio.run(rounds.tend())
    counts = {name: told(registry, f"{name}_total") for name in ("usage_partitions_made", "usage_partitions_dropped")}
    assert counts == {"usage_partitions_made": 1, "usage_partitions_dropped": 2}
    assert told(registry, "audit_entries_deleted_total") == 2  # the two tenants of the test
    assert 89 < told(registry, "usage_partitions_days_ahead") < 124


def test_a_db_node_that_leaves_it_to_another_tells_how_far_ahead_partitions_are(url: str, query: Query) -> None:
    registry = CollectorRegistry()
    rounds = upkeep_of(url, registry)
    with psycopg.connect(url) as other:
        other.execute("SELECT pg_advisory_lock(%s)", (upkeep.ADVISORY_LOCK,))
        assert not asyncio.run(rounds.tend())
        assert told(registry, "usage_partitions_days_ahead") > 89
        next_month = query(MONTHS, 1)[1][0]
        query(f"DROP TABLE stratakv.usage_history_{next_month}")
        assert not asyncio.run(rounds.tend())
        assert told(registry, "usage_partitions_days_ahead") <= 31  # the months behind the gap do not count


async def test_a_round_that_fails_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "RETRY_S", 0.01)
    registry = CollectorRegistry()
    task = asyncio.create_task(upkeep_of("postgresql://u@127.0.0.1:1/none", registry).run())
    await eventually_async(lambda: told(registry, "upkeep_failures_total") >= 2)
    task.cancel()
