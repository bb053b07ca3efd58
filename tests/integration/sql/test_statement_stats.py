"""The view stratakv.statement_stats: sums per role and statement, without literals, each role its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

from dbnode import statement_stats as module
from dbnode.sql.service import CallCost, InferCall, Login
from dbnode.sql.statement_meter import StatementCounts, StatementKey
from dbnode.statement_stats import StatementStats
from stratakv import migrate
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import DatabaseSettings, Secret
from stratakv.sqlfunctions import install, uninstall
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread
from tests.support import eventually

COST = CallCost(prompt_tokens=100, l1_tokens=32, l2_tokens=16, pool_tokens=8, generated_tokens=5)
ADA = Login("ada", 16384, "7", caller_oid=16384)
SLOW = """options => '{"delay_s": 0.05}'"""


class CostingModel(ReversingModel):
    """Every answer has the same price."""

    async def reserve(self, calls: Sequence[InferCall]) -> list[InferCall]:
        return list(calls)

    async def infer_text(self, call: InferCall) -> str:
        try:
            return await super().infer_text(call)
        finally:
            assert call.on_cost is not None
            call.on_cost(COST)


@pytest.fixture(scope="module")
def observed(cluster: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontThread]:
    """A face that keeps statistics in a database of its own."""
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE statistics_meta")
    migrate.upgrade(cluster.database_url("statistics_meta"))
    directory = tmp_path_factory.mktemp("skv")
    directory.chmod(0o711)
    for parent in directory.parents:
        with suppress(PermissionError):
            parent.chmod(parent.stat().st_mode | 0o111)
    stats = StatementStats(DatabaseSettings(url=Secret(cluster.database_url("statistics_meta"))), lambda: None)
    with front_thread(cluster, directory, CostingModel(), statements=stats, topics=stats.topics()) as thread:
        yield thread
        thread.run(stats.close())


@pytest.fixture
def database(cluster: EmbeddedPostgres, observed: FrontThread, request: pytest.FixtureRequest) -> Iterator[str]:
    name = "stats_" + request.node.name.partition("[")[0][5:50]
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        install(cluster.database_url(name), address_in(observed.settings.listener_dir))  # type: ignore[arg-type]
        yield name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def url(observed: FrontThread, database: str) -> str:
    return observed.url(database)


def rows(url: str, database: str, role: str | None = None) -> list[dict[str, Any]]:
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as connection:
        if role is not None:
            connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        found = connection.execute("SELECT * FROM stratakv.statement_stats WHERE database = %s", (database,))
        return sorted(found.fetchall(), key=lambda row: str(row["query"]))


def test_executions_of_a_statement_add_up_whatever_their_literals(url: str, database: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for name in ("ada", "bob"):
            query = f"SELECT infer('{name}' || i % 10, {SLOW}) FROM generate_series(1, 20) i"
            assert len(connection.execute(query).fetchall()) == 20
    [row] = rows(url, database)
    assert row["query"] == "SELECT infer($1 || i % $2, options => $3) FROM generate_series($4, $5) i"
    assert row["role"] == "postgres"
    counts = ("calls", "infer_calls", "distinct_prompts", "memo_hits", "errors")
    assert [row[name] for name in counts] == [2, 40, 20, 40, 0]
    tokens = ("prompt_tokens", "cached_l1_tokens", "cached_l2_tokens", "cached_pool_tokens", "generated_tokens")
    assert [row[name] for name in tokens] == [2000, 640, 320, 160, 100]
    assert row["wait_ms"] > 50
    assert row["first_seen"] <= row["last_seen"]


def test_a_direct_session_is_counted_without_its_statement(
    observed: FrontThread, cluster: EmbeddedPostgres, url: str, database: str
) -> None:
    with psycopg.connect(cluster.database_url(database), autocommit=True) as connection:
        connection.execute("SELECT infer('secret ' || i) FROM generate_series(1, 3) i")
    [row] = rows(url, database)
    assert row["query"] is None
    assert [row[name] for name in ("calls", "infer_calls", "distinct_prompts")] == [0, 3, 3]
    assert row["prompt_tokens"] == 300


def test_failures_are_counted(url: str, database: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection, pytest.raises(psycopg.Error, match="is wrong"):
        connection.execute("""SELECT infer('x', options => '{"fail": "it"}')""")
    [row] = rows(url, database)
    assert [row[name] for name in ("calls", "infer_calls", "errors")] == [1, 1, 1]


def test_a_role_sees_its_own_and_who_may_read_all_statistics_sees_all(
    cluster: EmbeddedPostgres, url: str, database: str
) -> None:
    with psycopg.connect(cluster.database_url(database), autocommit=True) as admin:
        admin.execute("CREATE ROLE stats_ada LOGIN; CREATE ROLE stats_bob LOGIN; CREATE ROLE stats_eve LOGIN")
        admin.execute("GRANT pg_read_all_stats TO stats_eve")
    try:
        for role in ("stats_ada", "stats_bob"):
            with psycopg.connect(url.replace("postgres@", f"{role}@"), autocommit=True) as connection:
                connection.execute("SELECT infer('x')")
        assert [row["role"] for row in rows(url, database, "stats_ada")] == ["stats_ada"]
        assert [row["role"] for row in rows(url.replace("postgres@", "stats_bob@"), database)] == ["stats_bob"]
        assert {row["role"] for row in rows(url.replace("postgres@", "stats_eve@"), database)} == {
            "stats_ada",
            "stats_bob",
        }
        assert {row["role"] for row in rows(url, database)} == {"stats_ada", "stats_bob"}
        with (
            psycopg.connect(url.replace("postgres@", "stats_ada@"), autocommit=True) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute("SELECT stratakv.sql_call('statements 1 -')")
    finally:
        with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
            admin.execute("DROP ROLE stats_ada, stats_bob, stats_eve")


def test_statements_of_prepared_and_piped_clients_are_known(url: str, database: str) -> None:
    with psycopg.connect(url, autocommit=True, prepare_threshold=1) as connection:
        for number in range(4):
            connection.execute("SELECT infer(%s || i) FROM generate_series(1, 2) i", (f"secret {number}",))
    [row] = rows(url, database)
    assert row["query"] == "SELECT infer($1 || i) FROM generate_series($2, $3) i"
    assert row["calls"] == 4


def test_without_a_metadata_database_the_view_says_so(
    front: FrontThread, cluster: EmbeddedPostgres, template: str
) -> None:
    with psycopg.connect(cluster.database_url(template), autocommit=True) as connection:
        with pytest.raises(psycopg.errors.CannotConnectNow, match="does not answer about 'statements'"):
            connection.execute("SELECT * FROM stratakv.statement_stats")
        assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_it_goes_with_the_functions(cluster: EmbeddedPostgres, database: str) -> None:
    uninstall(cluster.database_url(database))
    with psycopg.connect(cluster.database_url(database)) as connection:
        assert connection.execute("SELECT to_regclass('stratakv.statement_stats')").fetchone() == (None,)


async def test_two_nodes_add_up_and_the_oldest_are_dropped(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_MAX", 3)
    monkeypatch.setattr(module, "PRUNE_S", -1.0)
    await asyncio.to_thread(migrate.upgrade, postgres_url)
    nodes = [StatementStats(DatabaseSettings(url=Secret(postgres_url)), lambda: None) for _ in range(2)]
    for number in range(5):
        for node in nodes:
            node.add(StatementKey("ada", "d", ADA, f"query {number}"), StatementCounts(calls=1, infer_calls=10))
            await node.read("ada", ADA, is_all=False)
    found = await nodes[0].read("ada", ADA, is_all=False)
    assert sorted((row["query"], row["calls"], row["infer_calls"]) for row in found) == [
        (f"query {number}", 2, 20) for number in (2, 3, 4)
    ]
    assert await nodes[0].read("bob", ADA, is_all=False) == []
    for node in nodes:
        await node.close()


async def test_while_the_database_is_away_sums_wait_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING_MAX", 2)
    dropped: list[int] = []
    stats = StatementStats(DatabaseSettings(url=Secret("postgresql://u@127.0.0.1:1/none")), lambda: dropped.append(1))
    for number in range(4):
        stats.add(StatementKey("ada", "d", ADA, f"query {number}"), StatementCounts(calls=1))
    with pytest.raises(Exception, match="does not answer"):
        await stats.read("ada", ADA, is_all=False)
    assert len(dropped) == 2
    await stats.close()


def test_no_meter_is_left_behind(observed: FrontThread, url: str, database: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT infer('x')")
        connection.execute("SELECT 'infer'")
    eventually(lambda: not observed.front.book.running)
