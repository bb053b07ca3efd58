"""The sums of a day are those of its requests, whatever is written twice, late, or by several DB nodes at once."""

from __future__ import annotations

import asyncio
import datetime
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnode.generate import Outcome, Settled, Source
from dbnode.usage import UsageWriter
from stratakv.settings import DatabaseSettings, Secret
from tests.integration.usage.conftest import event, write, write_now

Query = Callable[..., list[tuple[Any, ...]]]
SUMMED = (
    "requests, cancelled, failed, prompt_tokens, cached_l1_tokens, generated_tokens, unused_requests, unused_tokens"
)
TABLES = "stratakv.usage_events, stratakv.usage_history, stratakv.usage_daily"

events = st.builds(
    event,
    st.integers(0, 12).map(lambda number: f"r{number}"),
    st.sampled_from(("acme", "bolt")),
    model=st.sampled_from(("m", "n")),
    source=st.sampled_from(Source),
    prompt=st.integers(4, 2**31 - 1),
    generated=st.integers(0, 1000),
    outcome=st.sampled_from(Outcome),
    error_code=st.none(),
)


def expected(settled: list[Settled]) -> dict[tuple[str, str, str], tuple[int, ...]]:
    """What the sums of one day must be, from the first event of each request."""
    first: dict[str, Settled] = {}
    for one in settled:
        first.setdefault(one.request.request_id, one)
    sums: dict[tuple[str, str, str], Counter[int]] = {}
    for one in first.values():
        usage, outcome = one.usage, one.outcome
        counts = outcome is not Outcome.UNUSED
        row = (
            counts,
            outcome is Outcome.CANCELLED,
            outcome is Outcome.FAILED,
            usage.prompt_tokens * counts,
            usage.tiers.l1 * counts,
            usage.completion_tokens * counts,
            not counts,
            (usage.prompt_tokens + usage.completion_tokens) * (not counts),
        )
        key = (one.request.caller.tenant.name, one.model, one.request.source.value)
        sums.setdefault(key, Counter()).update(dict(enumerate(row)))
    return {key: tuple(found[place] for place in range(8)) for key, found in sums.items()}


def sums_of(url: str) -> dict[tuple[str, str, str], tuple[int, ...]]:
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            f"SELECT t.name, model, source, {SUMMED} FROM stratakv.usage_daily d"
            " JOIN stratakv.tenants t ON t.id = d.tenant_id".encode()
        ).fetchall()
    return {row[:3]: row[3:] for row in rows}


@settings(max_examples=25)
@given(
    requests=st.lists(events, min_size=1, max_size=12, unique_by=lambda one: one.request.request_id),
    batches=st.lists(st.lists(st.integers(0, 11), max_size=8), max_size=5),
)
def test_sums_are_those_of_the_requests_each_counted_once(
    url: str, requests: list[Settled], batches: list[list[int]]
) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"TRUNCATE {TABLES}".encode())
    written = [[requests[place % len(requests)] for place in batch] for batch in batches]
    for batch in written:
        write_now(url, *batch)
    assert sums_of(url) == expected([one for batch in written for one in batch])


def test_several_db_nodes_add_to_the_same_sums(url: str, query: Query) -> None:
    async def write_all() -> None:
        shared = [[event(f"r{n}", ("acme", "bolt")[n % 2]) for n in range(i, 60 + i)] for i in range(0, 60, 10)]
        await asyncio.gather(*(write(url, part) for part in shared))

    asyncio.run(write_all())
    assert query("SELECT sum(requests), sum(prompt_tokens) FROM stratakv.usage_daily") == [(110, 1100)]
    assert query("SELECT count(*), count(DISTINCT request_id) FROM stratakv.usage_history") == [(110, 110)]


def test_what_is_written_late_is_booked_to_the_day_when_it_ended(url: str, query: Query) -> None:
    for request_id, days in (("two", 2), ("many", 30)):
        clock = iter((0.0, days * 86400.0))
        writer = UsageWriter(DatabaseSettings(url=Secret(url)), lambda: None, clock.__next__)
        writer.settled(event(request_id))
        asyncio.run(writer.close())
    today = query("SELECT (now() AT TIME ZONE 'UTC')::date")[0][0]
    rows = dict(query("SELECT request_id, (created_at AT TIME ZONE 'UTC')::date FROM stratakv.usage_history"))
    assert rows == {"two": today - datetime.timedelta(days=2), "many": today - datetime.timedelta(days=7)}
    assert [row[0] for row in query("SELECT day FROM stratakv.usage_daily ORDER BY day")] == sorted(rows.values())


def test_operators_see_usage_by_day_tenant_and_model(url: str, query: Query) -> None:
    write_now(url, event("a"), event("b", "bolt"), event("c", model="n", outcome=Outcome.UNUSED))
    month = query("SELECT date_trunc('month', (now() AT TIME ZONE 'UTC'))::date")[0][0]
    by_tenant = (
        "SELECT month, tenant, requests, cached_tokens, unused_tokens FROM stratakv.usage_by_tenant ORDER BY tenant"
    )
    assert query(by_tenant) == [(month, "acme", 1, 4, 15), (month, "bolt", 1, 4, 0)]
    by_model = "SELECT model, requests, prompt_tokens, unused_requests FROM stratakv.usage_by_model ORDER BY model"
    assert query(by_model) == [("m", 2, 20, 0), ("n", 0, 0, 1)]
    assert len(query("SELECT * FROM stratakv.usage_by_day")) == 3
