"""Looking ahead changes nothing that a client could see but the time."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import errors

from dbnode.sql.hints import HintStats
from dbnode.sql.messages import cstring, int16, int32, message
from tests.integration.sql.harness import SLOW, FrontThread, ReversingModel, outcome
from tests.integration.sql.raw_client import RawClient
from tests.support import eventually

Connection = psycopg.Connection[tuple[object, ...]]

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


@pytest.mark.parametrize("function", ["infer", "stratakv.infer"])
def test_rows_are_those_of_an_ordinary_function(connection: Connection, function: str) -> None:
    connection.execute("CREATE VIEW seen AS SELECT i, infer(body) AS body FROM t")
    cursor, simple = connection.cursor(), psycopg.ClientCursor(connection)
    for shape in SHAPES:
        with_parameter = f"SELECT * FROM ({shape.replace('%', '%%')}) q WHERE %{{c}}"
        query = shape.format(f=function)
        as_text = with_parameter.format(f=function, c="t")
        as_binary = with_parameter.format(f=function, c="b")
        expected = outcome(cursor, shape.format(f="pg_catalog.reverse"))
        assert outcome(simple, query) == expected, shape
        assert outcome(cursor, query) == expected, shape
        assert outcome(connection.cursor(binary=True), as_binary, True) == expected, shape
        assert outcome(cursor, as_text, True) == expected, shape
        with connection.transaction(force_rollback=True):
            assert outcome(cursor, as_text, True) == expected, shape


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
