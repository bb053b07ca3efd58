"""Which statements are looked ahead in, and what of them is run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.statements import TEXT_CHARS_MAX, TOKENS_MAX, collectable


@pytest.mark.parametrize(
    ("statement", "select"),
    [
        ("INSERT INTO t (a, b) SELECT 'é', infer(b) FROM u;", "SELECT 'é', infer(b) FROM u"),
        ("INSERT INTO t SELECT infer(b) FROM u ON CONFLICT (a) DO NOTHING RETURNING 1", "SELECT infer(b) FROM u"),
        ("INSERT INTO t WITH x AS (TABLE u) SELECT infer(b) FROM x", "WITH x AS (TABLE u) SELECT infer(b) FROM x"),
        ("CREATE TEMP TABLE x (a) AS SELECT infer(a) FROM t WITH DATA", "SELECT infer(a) FROM t"),
        ("CREATE MATERIALIZED VIEW v AS SELECT infer(a) FROM t", "SELECT infer(a) FROM t"),
        ("COPY (SELECT infer(a) FROM t) TO STDOUT (FORMAT csv)", "SELECT infer(a) FROM t"),
        ("UPDATE t SET a = infer(b), c = DEFAULT WHERE d = 'x'", "SELECT infer(b) FROM t WHERE d = 'x'"),
        ("UPDATE t x SET (a, b) = (c, infer(d)) FROM u RETURNING a", "SELECT (c, infer(d)) FROM t x, u"),
        ("EXPLAIN ANALYZE VERBOSE SELECT infer(a) FROM t", "SELECT infer(a) FROM t"),
        ("/* x */ explain (ANALYZE true, FORMAT json) INSERT INTO t SELECT infer(b) FROM u", "SELECT infer(b) FROM u"),
        ("EXPLAIN (ANALYZE) (SELECT infer(a) FROM t)", "(SELECT infer(a) FROM t)"),
        (
            "MERGE INTO t AS x USING (SELECT * FROM u) s ON x.a = infer(s.a)"
            " WHEN MATCHED AND CASE WHEN s.b THEN true END THEN UPDATE SET a = infer(s.b) = 'x', c = DEFAULT"
            " WHEN MATCHED THEN DELETE WHEN NOT MATCHED BY TARGET THEN INSERT (a, b) VALUES (infer(s.c), 1)",
            "SELECT CASE WHEN x.ctid IS NOT NULL AND (CASE WHEN s.b THEN true END)"
            " THEN CAST(ROW(infer(s.b) = 'x') AS text) WHEN x.ctid IS NOT NULL THEN NULL"
            " WHEN x.ctid IS NULL THEN CAST(ROW(infer(s.c), 1) AS text) END"
            " FROM (SELECT * FROM u) s LEFT JOIN t AS x ON x.a = infer(s.a)",
        ),
        ("DELETE FROM ONLY t USING u WHERE infer(t.a) = u.a", "SELECT 1 FROM ONLY t, u WHERE infer(t.a) = u.a"),
    ],
)
def test_the_part_that_reads_is_found(statement: str, select: str) -> None:
    found = collectable(statement)
    assert found is not None
    assert found.select == select


@pytest.mark.parametrize("statement", ["SELECT infer(a) FROM t", "WITH x AS (SELECT 1) SELECT infer(a) FROM t, x;"])
def test_a_select_is_run_as_it_is_written(statement: str) -> None:
    found = collectable(statement)
    assert found is not None
    assert found.select == statement


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1 FROM t",
        "SELECT infer('a')",
        "SELECT infer(a) FROM t FOR UPDATE",
        "SELECT infer(a) FROM t FOR KEY SHARE OF t",
        "SELECT infer(a) FROM t TABLESAMPLE system (1)",
        "SELECT infer(a) INTO u FROM t",
        "SELECT infer(a) FROM t; SELECT 2",
        "WITH d AS (DELETE FROM t RETURNING *) SELECT infer(a) FROM d",
        "WITH d AS (SELECT 1) UPDATE t SET a = infer(b)",
        "CREATE VIEW v AS SELECT infer(a) FROM t",
        "CREATE TABLE v AS SELECT infer(a) FROM t WITH NO DATA",
        "CREATE FUNCTION f() RETURNS text LANGUAGE sql AS 'SELECT infer(a) FROM t'",
        "EXPLAIN SELECT infer(a) FROM t",
        "EXPLAIN (VERBOSE, ANALYZE off) SELECT infer(a) FROM t",
        "EXPLAIN (ANALYZE) SELECT infer(a) FROM t; SELECT 1",
        "DECLARE c CURSOR FOR SELECT infer(a) FROM t",
        "PREPARE p AS SELECT infer(a) FROM t",
        "INSERT INTO t VALUES (infer('a'))",
        "COPY infer FROM STDIN",
        "MERGE INTO t USING u ON t.a = u.a WHEN NOT MATCHED BY SOURCE THEN UPDATE SET a = infer(t.b)",
        "MERGE INTO t USING u ON t.a = u.a WHEN MATCHED",
        "CALL infer(1)",
        "this is no infer SQL ' at all",
        "(" * 10_000 + "infer",
        "SELECT infer(a) FROM t -- " + "x" * TEXT_CHARS_MAX,
        "SELECT infer(a) FROM t WHERE b IN (1" + ", 1" * (TOKENS_MAX // 2) + ")",
    ],
)
def test_others_are_left_alone(statement: str) -> None:
    assert collectable(statement) is None


def test_every_called_name_is_told() -> None:
    found = collectable(
        'SELECT s.F1 /* ( */ (infer(a)), "Qu""oted"(1), gen_random_uuid(), \'no(\' FROM now() WHERE b IN (1)'
    )
    assert found is not None
    assert found.functions >= {"f1", "infer", 'Qu"oted', "gen_random_uuid", "now"}
    assert "no" not in found.functions


@pytest.mark.parametrize(
    ("statement", "is_bounded"),
    [
        ("SELECT infer(a) FROM t", False),
        ("SELECT infer(a) FROM t LIMIT $1", True),
        ("SELECT infer(a) FROM t FETCH FIRST ROW ONLY", True),
        ("SELECT 1 FROM t WHERE EXISTS (SELECT FROM u WHERE infer(a) = 'x')", True),
    ],
)
def test_a_statement_that_may_stop_early_is_known(statement: str, is_bounded: bool) -> None:
    found = collectable(statement)
    assert found is not None
    assert found.is_bounded is is_bounded


@pytest.mark.parametrize(
    ("statement", "is_one_level"),
    [
        ("SELECT infer(a) FROM t", True),
        ("SELECT count(infer('x' || lower(a))) FROM t JOIN u ON t.i = u.i", True),
        ("SELECT infer(a) FROM t WHERE infer(a) = 'yes'", True),
        ("INSERT INTO u SELECT i, infer_bool(a) FROM t", True),
        ("SELECT infer_row('{*}', to_jsonb(t)) FROM t", True),
        ("SELECT infer(infer(a)) FROM t", False),
        ("SELECT infer(a), infer(b) FROM t", False),
        ("SELECT mine(infer(a)) FROM t", False),
        ("SELECT infer_agg('sum up', a) FROM t", False),
        ("SELECT infer(a) FROM t JOIN seeing v ON true", False),
        ("SELECT infer(a) FROM t WHERE infer(a) IS DISTINCT FROM 'yes' LIMIT 5", False),
        ("WITH RECURSIVE r AS (SELECT 'a' AS a UNION ALL SELECT infer(a) FROM r) SELECT * FROM r", False),
    ],
)
def test_it_is_known_whether_answers_lead_to_further_calls(statement: str, is_one_level: bool) -> None:
    found = collectable(statement, frozenset({"seeing"}))
    assert found is not None
    assert found.is_one_level == is_one_level


_WORDS = [
    "infer",
    "(",
    ")",
    "SELECT",
    "FROM",
    "t",
    "UPDATE",
    "DELETE",
    "SET",
    "=",
    ",",
    "WHERE",
    "INSERT",
    "INTO",
    "AS",
]
_WORDS += ["WITH", "COPY", "CREATE", "TABLE", "'a'", "LIMIT", ";", "ON", "CONFLICT", "$1", "'", '"', "$$", "--", "/*"]


@given(st.lists(st.sampled_from(_WORDS), max_size=30))
def test_no_text_raises(words: list[str]) -> None:
    collectable(" ".join(["infer", *words]))
    collectable(" ".join([*words, "infer"]))
