"""Looking ahead makes statements faster and changes nothing else."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import asyncpg
import psycopg
import pytest
from psycopg import errors

from dbnode.sql.hints import HintStats
from dbnode.sql.messages import cstring, int16, int32, message
from tests.integration.sql.harness import FrontThread, ReversingModel
from tests.integration.sql.raw_client import RawClient
from tests.support import eventually

SLOW = """options => '{"delay_s": 0.05}'"""
VERY_SLOW = """options => '{"delay_s": 30}'"""
MANY = 16
TABLE = """
CREATE TABLE t AS
SELECT i, i % 10 AS g, 'text ' || i % 40 AS body, CASE WHEN i % 7 = 0 THEN NULL ELSE 'n' || i END AS maybe
FROM generate_series(1, 120) i
"""
Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    """Autocommit, with a table."""
    with psycopg.connect(url, autocommit=True) as opened:
        opened.execute(TABLE)
        yield opened


@pytest.fixture
def stats(front: FrontThread) -> Callable[[], HintStats]:
    """Counters of this test only."""
    before = replace(front.front.hint_stats)

    def since() -> HintStats:
        now = front.front.hint_stats
        return HintStats(*(getattr(now, name) - getattr(before, name) for name in HintStats.__slots__))

    return since


# Batches


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
    eventually(lambda: stats() == HintStats(passes=2, collected=800, distinct=400, consumed=400, wasted=0))


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
    assert stats().passes == 2


# Rows as soon as they are ready


def _stream(connection: Connection, query: str) -> Iterator[tuple[object, ...]]:
    connection.execute("SET stratakv.stream = on")
    return connection.cursor().stream(query)


def test_rows_stream_while_the_model_works(connection: Connection, model: ReversingModel) -> None:
    query = (
        "SELECT infer('p' || i, options => jsonb_build_object('delay_s', CASE WHEN i <= 10 THEN 0 ELSE 3 END))"
        " FROM generate_series(1, 40) i"
    )
    seen = []
    for (answer,) in _stream(connection, query):
        if len(seen) < 10:
            assert model.running == 30
        seen.append(answer)
    assert seen == [f"p{i}"[::-1] for i in range(1, 41)]
    assert len(model.calls) == 40


def test_streaming_shows_the_client_nothing_of_it(connection: Connection, model: ReversingModel) -> None:
    notices: list[str | None] = []
    connection.add_notice_handler(lambda diagnostic: notices.append(diagnostic.message_primary))
    connection.execute(
        "CREATE FUNCTION say(t text) RETURNS text LANGUAGE plpgsql STABLE AS $$BEGIN RAISE INFO '%', t; RETURN t; END$$"
    )
    connection.execute("SET stratakv.stream = on")
    query = f"SELECT infer(body, {SLOW}), say('said') FROM t WHERE i <= 20"
    for cursor in (connection.cursor(), psycopg.ClientCursor(connection), connection.cursor(binary=True)):
        assert len(cursor.execute(query).fetchall()) == 20
    assert notices == ["said"] * 60
    assert model.most_running > 10
    connection.execute("SET stratakv.stream = off")
    assert len(connection.execute(query).fetchall()) == 20


@pytest.mark.parametrize(
    "query",
    [
        "SELECT coalesce({f}(body), {f}('x' || body)) FROM t ORDER BY i",
        "SELECT {f}('<' || {f}(body)) FROM t ORDER BY i",
        "SELECT i FROM t WHERE {f}(body) > '3' ORDER BY i LIMIT 20",
        "SELECT i, {f}(body) FROM t WHERE {f}(maybe) IS NULL ORDER BY i",
        "SELECT i / (i - 50), {f}(body) FROM t ORDER BY i",
    ],
)
def test_streaming_changes_no_row(connection: Connection, model: ReversingModel, query: str) -> None:
    expected = _outcome(connection.cursor(), query.format(f="pg_catalog.reverse"))
    connection.execute("SET stratakv.stream = on")
    assert _outcome(connection.cursor(), query.format(f="infer")) == expected
    assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


# Nothing else changes

SHAPES = [
    "SELECT i, {f}(body) FROM t ORDER BY i",
    "SELECT DISTINCT {f}(body) FROM t",
    "SELECT {f}(body), count(*) FROM t GROUP BY 1",
    "SELECT g, string_agg({f}(body), ',' ORDER BY i) FROM t GROUP BY g HAVING max({f}(body)) > '1'",
    "SELECT i FROM t WHERE {f}(body) LIKE '1%'",
    "SELECT i, {f}(maybe) FROM t",
    "SELECT i FROM t WHERE {f}(maybe) IS DISTINCT FROM '1n' AND {f}(body) > '3'",
    "SELECT i FROM t WHERE {f}(body) > '3' OR {f}(maybe) > '5'",
    "SELECT coalesce({f}(maybe), {f}(body)) FROM t",
    "SELECT CASE WHEN {f}(body) < '3' THEN {f}('a' || body) ELSE {f}('b' || body) END FROM t",
    "SELECT {f}({f}(body) || i) FROM t",
    "SELECT a.i, b.i FROM t a JOIN t b ON {f}(a.body) = {f}(b.body) WHERE a.i < 10 AND b.i < 10",
    "SELECT a.i, {f}(b.body) FROM t a LEFT JOIN t b ON b.i = a.i + 100",
    "SELECT i, (SELECT {f}(min(u.body)) FROM t u WHERE u.g = t.g) FROM t",
    "SELECT i FROM t WHERE EXISTS (SELECT FROM t u WHERE u.i = t.i + 1 AND {f}(u.body) > '2')",
    "SELECT i FROM t WHERE NOT EXISTS (SELECT FROM t u WHERE u.i = t.i + 1 AND {f}(u.body) > '2')",
    "WITH x AS (SELECT i, {f}(body) AS r FROM t) SELECT a.r, b.r FROM x a JOIN x b ON a.i = b.i + 1",
    "WITH x AS MATERIALIZED (SELECT i, body FROM t WHERE {f}(body) > '3') SELECT {f}('x' || body) FROM x",
    "SELECT i, {f}(body) FROM t ORDER BY {f}(body), i LIMIT 7 OFFSET 2",
    "SELECT i, row_number() OVER (PARTITION BY {f}(body) ORDER BY i) FROM t",
    "SELECT {f}(body) FROM t UNION SELECT {f}('u' || body) FROM t",
    "SELECT {f}(body) FROM t EXCEPT SELECT {f}(body) FROM t WHERE g < 5",
    "SELECT s.r FROM t, LATERAL (SELECT {f}(t.body || g) AS r) s WHERE t.i < 30",
    "WITH RECURSIVE r AS (SELECT 1 AS n, {f}('a1') AS v UNION ALL SELECT n + 1, {f}(v || n) FROM r WHERE n < 6) TABLE r",
    "SELECT {f}(body) FROM (SELECT DISTINCT body FROM t WHERE {f}(body) <> '1' LIMIT 1000) s",
    "SELECT i, {f}(body) FROM seen WHERE i < 50",
    "SELECT count(*) FILTER (WHERE {f}(body) > '2') FROM t",
    "VALUES ({f}('a')), ({f}('b'))",
    "SELECT i / 0, {f}(body) FROM t",
]


def _outcome(cursor: psycopg.Cursor[tuple[object, ...]], query: str, *parameters: object) -> object:
    """Rows in any order, or the error."""
    try:
        return sorted(map(repr, cursor.execute(query, parameters or None).fetchall()))
    except psycopg.Error as error:
        return error.sqlstate


@pytest.mark.parametrize("function", ["infer", "stratakv.infer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_those_of_an_ordinary_function(connection: Connection, shape: str, function: str) -> None:
    connection.execute("CREATE VIEW seen AS SELECT i, infer(body) AS body FROM t")
    with_parameter = f"SELECT * FROM ({shape.replace('%', '%%')}) q WHERE %{{c}}"
    query = shape.format(f=function)
    as_text = with_parameter.format(f=function, c="t")
    as_binary = with_parameter.format(f=function, c="b")
    cursor, simple = connection.cursor(), psycopg.ClientCursor(connection)
    expected = _outcome(cursor, shape.format(f="pg_catalog.reverse"))
    assert _outcome(simple, query) == expected
    assert _outcome(cursor, query) == expected
    assert _outcome(connection.cursor(binary=True), as_binary, True) == expected
    assert _outcome(cursor, as_text, True) == expected
    with connection.transaction(force_rollback=True):
        assert _outcome(cursor, as_text, True) == expected


@pytest.mark.parametrize(
    ("statement", "inferred"),
    [
        ("SELECT nextval('s'), infer(body) FROM t", 120),
        ("SELECT infer(body), drawn() FROM t", 120),
        ("INSERT INTO kept SELECT nextval('s') || infer(body) FROM t", 120),
        ("WITH w AS (INSERT INTO kept SELECT nextval('s')::text FROM t RETURNING *) SELECT infer(answer) FROM w", 120),
        ("SELECT infer(body), lying() FROM t", 120),
        ("SELECT infer(body) FROM numbered", 120),
    ],
)
def test_side_effects_happen_once(connection: Connection, statement: str, inferred: int) -> None:
    connection.execute("CREATE SEQUENCE s; CREATE TABLE kept (answer text)")
    connection.execute("CREATE FUNCTION drawn() RETURNS bigint LANGUAGE sql VOLATILE AS $$ SELECT nextval('s') $$")
    connection.execute(
        "CREATE FUNCTION lying() RETURNS bigint LANGUAGE plpgsql STABLE AS $$BEGIN RETURN nextval('s'); END$$"
    )
    connection.execute("CREATE VIEW numbered AS SELECT nextval('s') AS n, body FROM t OFFSET 0")
    assert connection.execute(statement).rowcount == inferred
    assert connection.execute("SELECT last_value FROM s").fetchone() == (120,)


def test_random_rows_and_locks_are_not_looked_ahead_for(connection: Connection, stats: Callable[[], HintStats]) -> None:
    connection.execute("SELECT infer(body || random()) FROM t")
    connection.execute("SELECT infer(body) FROM t TABLESAMPLE system (50)")
    connection.execute("SELECT infer(body) FROM t FOR UPDATE")
    connection.execute("SELECT infer(body) FROM t WHERE i < 3; SELECT 1")
    assert stats() == HintStats()


def test_prompts_that_change_with_the_clock_are_sent_ahead_at_most_once(
    connection: Connection, model: ReversingModel
) -> None:
    rows = connection.execute("SELECT infer(body || now()) FROM t WHERE i <= 10").fetchall()
    assert len(rows) == 10
    assert len(model.calls) == 20


def test_answers_drawn_by_lot_are_not_shared(connection: Connection, model: ReversingModel) -> None:
    connection.execute("""SELECT infer('a', options => '{"temperature": 1}') FROM t WHERE i <= 10""")
    assert len(model.calls) == 10
    connection.execute("""SELECT infer('a', options => '{"temperature": 1, "seed": 7}') FROM t WHERE i <= 10""")
    assert len(model.calls) == 11


def test_a_failed_inference_fails_the_statement_only_if_it_needs_it(connection: Connection) -> None:
    failing = """infer(body, options => '{"fail": "x"}')"""
    with pytest.raises(errors.InvalidParameterValue, match="the option x is wrong"):
        connection.execute(f"SELECT {failing} FROM t")
    query = f"SELECT CASE WHEN infer(body) IS NULL THEN {failing} ELSE 'fine' END FROM t"
    assert set(connection.execute(query).fetchall()) == {("fine",)}


def test_a_refused_inference_is_made_again_when_it_is_needed(connection: Connection, model: ReversingModel) -> None:
    query = """SELECT infer(body, options => '{"delay_s": 0.01, "running_max": 5}') FROM t WHERE i <= 40 ORDER BY i"""
    assert connection.execute(query).fetchall() == [(f"text {i % 40}"[::-1],) for i in range(1, 41)]
    assert model.refused > 0


def test_hints_that_nobody_needed_are_counted(connection: Connection, stats: Callable[[], HintStats]) -> None:
    connection.execute("CREATE VIEW either AS SELECT coalesce(infer(body), infer('x' || body)) AS infer, i FROM t")
    connection.execute("SELECT infer FROM either WHERE i <= 10")
    eventually(lambda: (stats().distinct, stats().consumed, stats().wasted) == (20, 10, 10))


@pytest.mark.parametrize(
    "query",
    [
        "SELECT coalesce({f}(body), {f}('x' || body)) FROM t",
        "SELECT i FROM t WHERE {f}(body) < '5' OR {f}('b' || body) < '5'",
        "SELECT {f}('s' || body) FROM t WHERE {f}(body) IS DISTINCT FROM '7'",
        "SELECT {f}('s' || i) FROM t WHERE NOT EXISTS (SELECT FROM t u WHERE u.i = t.i + 1 AND {f}(u.body) > '2')",
        "SELECT {f}('s' || i) FROM t WHERE {f}(body) NOT IN (SELECT {f}('x' || body) FROM t u WHERE u.i < 5)",
        "SELECT CASE WHEN {f}(body) < '3' THEN {f}('a' || body) WHEN {f}('c' || i) < '5' THEN '' ELSE {f}('b' || i) END"
        " FROM t",
        "WITH c AS (SELECT i, {f}(body) AS v FROM t) SELECT {f}('s' || i) FROM c WHERE v IS DISTINCT FROM '1'",
        "SELECT {f}(string_agg({f}(body), '' ORDER BY i)) FROM t GROUP BY g",
        "SELECT {f}('s' || body) FROM t ORDER BY {f}(body), i LIMIT 5",
        "SELECT {f}('s' || body) FROM t WHERE {f}(body) < '3' OR {f}('b' || body) < '2' ORDER BY i LIMIT 5",
        "SELECT {f}('s' || r) FROM (SELECT {f}(body) AS r, count(*) FROM t GROUP BY {f}(body)) q WHERE r > '3'",
        """SELECT coalesce({f}(body, options => NULL), {f}(i::text, NULL, '{{"seed": 1}}')) FROM t""",
    ],
)
def test_a_call_that_another_one_decides_about_is_sent_when_that_is_known(
    connection: Connection, model: ReversingModel, stats: Callable[[], HintStats], query: str
) -> None:
    found = connection.execute(query.format(f="infer")).fetchall()
    eventually(lambda: stats().consumed + stats().wasted == stats().distinct)
    assert stats().wasted == 0
    connection.execute("SET stratakv.hints = off")
    asked = {call.prompt for call in model.calls}
    model.calls.clear()
    assert connection.execute(query.format(f="infer")).fetchall() == found
    assert asked == {call.prompt for call in model.calls}


def test_a_number_that_a_client_writes_means_nothing(connection: Connection, model: ReversingModel) -> None:
    query = """SELECT coalesce(infer(body, options => '{"@site": 7}'), infer('x' || body)) FROM t WHERE i <= 3"""
    assert len(connection.execute(query).fetchall()) == 3
    assert [call.options for call in model.calls[-3:]] == [{"@site": 7}] * 3


def test_a_function_of_the_same_name_is_looked_ahead_in_as_it_is(connection: Connection, model: ReversingModel) -> None:
    connection.execute(
        "CREATE FUNCTION infer(number int) RETURNS text LANGUAGE sql STABLE AS $$SELECT stratakv.infer('n' || number)$$"
    )
    query = "SELECT coalesce(infer(i), infer(body)) FROM t WHERE i <= 40 ORDER BY i"
    assert connection.execute(query).fetchall() == [(f"n{i}"[::-1],) for i in range(1, 41)]


def test_the_unnamed_statement_survives(front: FrontThread, database: str, stats: Callable[[], HintStats]) -> None:
    query = "SELECT infer('p' || i) FROM generate_series(1, 3) i"
    with RawClient(front.settings.port) as client:
        client.log_in(database)
        client.send(message(b"P", cstring("") + cstring("SELECT 'still here'") + int16(0)) + message(b"S"))
        client.read_until(b"Z\0\0\0\5I")
        bind = cstring("") + cstring("mine") + int16(0) * 3
        client.send(
            message(b"P", cstring("mine") + cstring(query) + int16(0))
            + message(b"B", bind)
            + message(b"E", cstring("") + int32(0))
            + message(b"S")
        )
        assert b"3p" in client.read_until(b"Z\0\0\0\5I")
        client.send(
            message(b"B", cstring("") + cstring("") + int16(0) * 3)
            + message(b"E", cstring("") + int32(0))
            + message(b"S")
        )
        assert b"still here" in client.read_until(b"Z\0\0\0\5I")
    assert stats().passes == 2


def test_a_pass_leaves_nothing_behind(connection: Connection) -> None:
    connection.execute("SET statement_timeout = '20s'")
    assert connection.execute("SELECT count(infer(body)) FROM t").fetchone() == (120,)
    assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert connection.execute("SHOW statement_timeout").fetchone() == ("20s",)
    assert connection.execute("SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'strata%'").fetchone() == (
        0,
    )
    connection.execute("CREATE TABLE written AS SELECT infer(body) FROM t WHERE i < 4")
    assert connection.execute("SELECT count(*) FROM written").fetchone() == (3,)


def test_statements_sent_behind_it_are_answered_in_order(connection: Connection) -> None:
    with connection.pipeline() as pipeline:
        first = connection.execute(f"SELECT count(infer(body, {SLOW})) FROM t")
        pipeline.sync()
        second = connection.execute("SELECT 2")
        assert (first.fetchone(), second.fetchone()) == ((120,), (2,))


# What ends a wait


def test_notifications_arrive_meanwhile(connection: Connection, url: str, model: ReversingModel) -> None:
    connection.execute("LISTEN news")
    with psycopg.connect(url, autocommit=True) as sender, ThreadPoolExecutor(1) as pool:
        query = """SELECT count(infer(body, options => '{"delay_s": 0.5}')) FROM t"""
        running = pool.submit(connection.execute, query)
        eventually(lambda: model.running)
        sender.execute("NOTIFY news, 'hello'")
        assert running.result().fetchone() == (120,)
        assert [note.payload for note in connection.notifies(timeout=10, stop_after=1)] == ["hello"]


def test_cancel_while_the_model_works_ends_the_statement(connection: Connection, model: ReversingModel) -> None:
    before = model.cancelled
    for send in (connection.execute, psycopg.ClientCursor(connection).execute):
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(send, f"SELECT infer(body, {VERY_SLOW}) FROM t")
            eventually(lambda: model.running > MANY)
            connection.cancel_safe()
            with pytest.raises(errors.QueryCanceled):
                running.result()
        eventually(lambda: model.running == 0)
        assert model.cancelled > before
        assert connection.execute("SELECT count(infer(body)) FROM t").fetchone() == (120,)


def test_statement_timeout_ends_the_wait(connection: Connection, model: ReversingModel) -> None:
    connection.execute("SET statement_timeout = '500ms'")
    with pytest.raises(errors.QueryCanceled, match="statement timeout"):
        connection.execute(f"SELECT infer(body, {VERY_SLOW}) FROM t")
    eventually(lambda: model.running == 0)
    assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_inference_stops_when_the_client_is_gone_meanwhile(url: str, model: ReversingModel) -> None:
    connection = psycopg.connect(url, autocommit=True)
    connection.execute("SELECT infer('bind')")
    connection.pgconn.send_query(f"SELECT infer('p' || i, {VERY_SLOW}) FROM generate_series(1, 40) i".encode())
    eventually(lambda: model.running > MANY)
    connection.close()
    eventually(lambda: model.running == 0)


def test_a_long_pass_ends_with_its_budget(front: FrontThread, url: str, model: ReversingModel) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION nap(seconds float) RETURNS text LANGUAGE plpgsql STABLE AS"
            " $$BEGIN PERFORM pg_sleep(seconds); RETURN 'slept'; END$$"
        )
        query = "SELECT infer(nap(2.2) || i) FROM generate_series(1, 1) i"
        assert connection.execute(query).fetchone() == ("1tpels",)
        assert len(model.calls) == 1


def test_many_sessions_look_ahead_at_once(url: str, model: ReversingModel) -> None:
    barrier = threading.Barrier(8)

    def ask(number: int) -> list[tuple[str]]:
        with psycopg.connect(url, autocommit=True) as connection:
            barrier.wait()
            query = f"SELECT infer(%s || i, {SLOW}) FROM generate_series(1, 30) i"
            return connection.execute(query, (f"{number}-",)).fetchall()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert found == [[(f"{number}-{i}"[::-1],) for i in range(1, 31)] for number in range(8)]
    assert len(model.calls) == 240


def test_cancels_that_hit_a_statement_of_the_gateway_leave_the_session_sound(url: str, direct_url: str) -> None:
    right = [(f"p{i}"[::-1],) for i in range(1, 101)]
    query = "SELECT infer('p' || i) FROM generate_series(1, 1000) i LIMIT 100"
    ended = threading.Event()
    with psycopg.connect(url, autocommit=True) as connection, ThreadPoolExecutor(1) as pool:
        connection.execute("SELECT infer('bind')")

        def disturb(pid: int) -> None:
            with psycopg.connect(direct_url, autocommit=True) as other:
                while not ended.wait(0.003):
                    other.execute("SELECT pg_cancel_backend(%s)", (pid,))

        disturbing = pool.submit(disturb, connection.info.backend_pid)
        try:
            for _ in range(40):
                with contextlib.suppress(errors.QueryCanceled):
                    assert connection.execute(query).fetchall() == right
                assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        finally:
            ended.set()
        disturbing.result()
        assert connection.execute(query).fetchall() == right
        connection.execute("CREATE TABLE sound (i int)")
