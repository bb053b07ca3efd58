"""Looking ahead makes statements faster."""

from __future__ import annotations

from collections.abc import Callable

import asyncpg
import psycopg
import pytest

from dbnode.sql.hints import HintStats
from tests.integration.sql.harness import MANY, SLOW, FrontThread, ReversingModel
from tests.support import eventually

Connection = psycopg.Connection[tuple[object, ...]]


@pytest.mark.parametrize("cursor_class", [psycopg.Cursor, psycopg.ClientCursor])
def test_rows_are_inferred_together_and_once_each(
    url: str, model: ReversingModel, stats: Callable[[], HintStats], cursor_class: type[psycopg.Cursor[tuple[str]]]
) -> None:
    with psycopg.connect(url, autocommit=True, cursor_factory=cursor_class) as connection:
        connection.execute("CREATE TABLE rows AS SELECT 'row ' || i AS body FROM generate_series(1, 400) i")
        rows = connection.execute(f"SELECT body, infer(%s || body, {SLOW}) FROM rows", ("a ",)).fetchall()
    assert set(rows) == {(f"row {i}", f"a row {i}"[::-1]) for i in range(1, 401)}
    assert len(model.calls) == 400
    assert model.most_running > MANY
    eventually(lambda: stats() == HintStats(passes=1, distinct=400, consumed=400, wasted=0))


def test_equal_prompts_are_one_inference(connection: Connection, model: ReversingModel) -> None:
    query = f"SELECT count(infer('p' || i % 100, {SLOW})) FROM generate_series(1, 2000) i"
    assert connection.execute(query).fetchone() == (2000,)
    assert len(model.calls) == 100
    assert model.most_running > MANY


def test_limit_stays_cheap(connection: Connection, model: ReversingModel) -> None:
    connection.execute("CREATE TABLE big AS SELECT i % 4 || '-' || i AS body FROM generate_series(1, 10000) i")
    rows = connection.execute("SELECT body FROM big WHERE infer(body) LIKE '%-0' LIMIT 20").fetchall()
    assert len(rows) == 20
    assert len(model.calls) <= 150
    assert model.most_running > MANY


def test_inference_of_inference_takes_two_rounds(connection: Connection, model: ReversingModel) -> None:
    rows = connection.execute(f"SELECT infer('<' || infer(body, {SLOW}), {SLOW}) FROM t").fetchall()
    assert rows == [(f"text {i % 40}<",) for i in range(1, 121)]
    assert len(model.calls) == 80
    assert model.most_running > MANY


def test_sql_prepared_by_drivers_is_looked_ahead_in(connection: Connection, model: ReversingModel) -> None:
    for number in range(8):
        found = connection.execute(
            f"SELECT infer(%s || body, {SLOW}) FROM t WHERE i <= 20 ORDER BY i",
            (str(number),),
            prepare=True,
        ).fetchall()
        assert found == [(f"{number}text {i}"[::-1],) for i in range(1, 21)]
    assert model.most_running > MANY
    assert len(model.calls) == 160


async def test_asyncpg_is_looked_ahead_for_from_the_first_run_on(url: str, front: FrontThread) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.fetchval("SELECT infer('bind')")
        for text in ("ab", "cd"):
            front.model.most_running = 0
            query = f"SELECT infer($1 || i, {SLOW}) AS answer FROM generate_series(1, 40) i"
            rows = await connection.fetch(query, text)
            assert [row["answer"] for row in rows] == [f"{text}{i}"[::-1] for i in range(1, 41)]
            assert front.model.most_running > MANY
    finally:
        await connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        f"INSERT INTO kept SELECT infer(body, {SLOW}) FROM t ON CONFLICT DO NOTHING RETURNING answer",
        f"CREATE TABLE made AS SELECT infer(body, {SLOW}) FROM t",
        f"CREATE MATERIALIZED VIEW made AS SELECT infer(body, {SLOW}) FROM t WITH DATA",
        f"COPY (SELECT infer(body, {SLOW}) FROM t) TO STDOUT",
        f"UPDATE t AS x SET g = DEFAULT, maybe = infer(x.body, {SLOW}) FROM t y WHERE x.i = y.i RETURNING x.maybe",
        f"DELETE FROM t WHERE infer(body, {SLOW}) <> 'x'",
        f"MERGE INTO t USING t AS s ON t.i = s.i WHEN MATCHED AND s.i < 0 THEN DELETE"
        f" WHEN MATCHED THEN UPDATE SET maybe = infer(s.body, {SLOW})",
    ],
)
def test_statements_around_a_select_are_looked_ahead_in(
    connection: Connection, model: ReversingModel, statement: str
) -> None:
    connection.execute("CREATE TABLE kept (answer text)")
    if statement.startswith("COPY"):
        with connection.cursor().copy(statement) as copy:
            assert len(list(copy.rows())) == 120
    else:
        assert connection.execute(statement).rowcount == 120
    assert len(model.calls) == 40
    assert model.most_running > MANY


def test_an_explain_that_runs_its_statement_is_looked_ahead_in(connection: Connection, model: ReversingModel) -> None:
    plan = connection.execute(f"EXPLAIN (ANALYZE, COSTS off) SELECT infer(body, {SLOW}) FROM t").fetchall()
    assert "rows=120" in str(plan)
    assert len(model.calls) == 40
    assert model.most_running > MANY


def test_an_explain_that_runs_nothing_asks_nothing(connection: Connection, model: ReversingModel) -> None:
    connection.execute("SELECT infer('bind')")
    model.calls.clear()
    query = "SELECT i FROM t WHERE body = infer('planned')"
    simple = psycopg.ClientCursor(connection)
    for explain in ("EXPLAIN", "EXPLAIN VERBOSE", "explain (FORMAT json, ANALYZE off)", "EXPLAIN (GENERIC_PLAN)"):
        if "GENERIC" in explain and connection.info.server_version < 160000:
            continue
        assert connection.execute(f"{explain} {query}").fetchall()
        assert simple.execute(f"{explain} {query}").fetchall()
    with connection.transaction():
        assert connection.execute(f"EXPLAIN {query}").fetchall()
    assert model.calls == []


async def test_what_follows_an_explain_in_a_pipeline_is_answered(url: str, model: ReversingModel) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute("SELECT infer('bind')")
        async with connection.pipeline() as pipeline:
            cursors = []
            for number in range(20):
                cursors.append(await connection.execute("EXPLAIN SELECT 1 FROM pg_class WHERE relname = infer('x')"))
                await pipeline.sync()
                cursors.append(await connection.execute(f"SELECT infer('n{number}')"))
                await pipeline.sync()
            answers = [await cursor.fetchall() for cursor in cursors[1::2]]
    assert answers == [[(f"n{number}"[::-1],)] for number in range(20)]
    assert "x" not in {call.prompt for call in model.calls}


def test_views_that_hide_a_call_are_looked_ahead_in(connection: Connection, url: str, model: ReversingModel) -> None:
    connection.execute(f"CREATE VIEW answers AS SELECT i, infer(body, {SLOW}) AS answer FROM t")
    connection.execute('CREATE VIEW "Best" AS SELECT answer FROM answers WHERE i <= 40')
    connection.execute("CREATE MATERIALIZED VIEW kept AS SELECT count(answer) FROM answers")
    with psycopg.connect(url, autocommit=True) as other:
        for query in ("SELECT * FROM answers", 'SELECT * FROM "Best"', "INSERT INTO t (body) TABLE answers"):
            model.most_running = 0
            if "TABLE" in query:
                query = "INSERT INTO t (body) SELECT answer FROM answers"
            other.execute(query)
            assert model.most_running > MANY
        model.most_running = 0
        other.execute("ALTER VIEW answers RENAME TO renamed")
        other.execute("SELECT * FROM renamed WHERE i <= 120")
        assert model.most_running > MANY
        model.calls.clear()
        assert other.execute("SELECT * FROM kept").fetchone() == (120,)
        assert model.calls == []


def test_one_row_of_constants_costs_no_pass(connection: Connection, stats: Callable[[], HintStats]) -> None:
    assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)
    assert stats() == HintStats()


@pytest.mark.parametrize("off", ["off", "false", "no", "0"])
def test_a_session_can_switch_it_off(connection: Connection, stats: Callable[[], HintStats], off: str) -> None:
    connection.execute(f"SET stratakv.hints = '{off}'")
    assert connection.execute("SELECT count(infer(body)) FROM t").fetchone() == (120,)
    assert stats() == HintStats()
    connection.execute("SET stratakv.hints = on")
    connection.execute("SELECT count(infer(body)) FROM t")
    assert stats().passes == 1
