"""Which calls decide about others, and how a pass tells them apart."""

from __future__ import annotations

import pytest

from dbnode.sql.statements import collectable

OPTIONS = """options => '{"@site": %d}'::pg_catalog.jsonb"""


@pytest.mark.parametrize(
    ("statement", "governors"),
    [
        ("SELECT 1 FROM t WHERE infer(a) = '' OR infer(b) = '' OR infer(c) = ''", {2: {1}, 3: {1, 2}}),
        ("SELECT 1 FROM t WHERE infer(a) = '' AND infer(b) = ''", {1: {2}, 2: {1}}),
        ("SELECT coalesce(infer(a), infer(b)) FROM t", {2: {1}}),
        (
            "SELECT CASE infer(a) WHEN infer(b) THEN infer(c) WHEN '' THEN infer(d) ELSE infer(e) END FROM t",
            {2: {1}, 3: {1, 2}, 4: {1, 2}, 5: {1, 2}},
        ),
        ("SELECT infer(concat(infer(a), b)) FROM t", {1: {2}}),
        ("SELECT infer(a) FROM t JOIN u ON infer(b) IS NULL WHERE infer(c) IS NULL", {1: {2, 3}, 2: {3}, 3: {2}}),
        ("SELECT infer(a) FROM t GROUP BY infer(b) HAVING infer(c) IS NULL", {1: {2, 3}, 3: {2}}),
        ("SELECT infer(a) FROM t ORDER BY infer(b) LIMIT 1", {1: {2}}),
        ("SELECT count(infer(a)) FILTER (WHERE infer(b) IS NULL) FROM t", {1: {2}}),
        ("SELECT infer(a) FROM t WHERE NOT EXISTS (SELECT FROM u WHERE infer(b) = '')", {1: {2}}),
        ("SELECT (SELECT infer(a) FROM u) FROM t WHERE infer(b) IS NULL", {1: {2}}),
        ("WITH c AS (SELECT infer(a) v, b FROM t) SELECT infer(b) FROM c WHERE v IS NULL", {2: {1}}),
        ("SELECT infer(b) FROM (SELECT infer(a), b FROM t) s (v, b) WHERE s.v IS NULL", {1: {2}}),
        ("SELECT infer(b) FROM (SELECT b FROM t WHERE infer(a) IS NULL) s", {1: {2}}),
        ("SELECT infer(s) FROM (SELECT b FROM t WHERE infer(a) IS NULL UNION SELECT infer(c)) s", {1: {2, 3}}),
        ("SELECT infer(b) FROM t WHERE infer_tokens(a) > 3", {1: {0}}),
        ("SELECT infer(a), upper(infer(a)), infer(b) FROM t WHERE infer(a) IS NULL", {2: {1}}),
    ],
)
def test_calls_that_decide_about_others_are_known(statement: str, governors: dict[int, set[int]]) -> None:
    found = collectable(statement)
    assert found is not None
    assert found.sites is not None
    assert {number: set(found.sites.governors[number]) for number in found.sites.governors} == governors


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT infer(a) FROM t",
        "SELECT infer(a), infer(b) FROM t",
        "SELECT infer(a) = infer(b) FROM t ORDER BY infer(a)",
        "SELECT 1 FROM t JOIN u ON infer(a) = infer(b)",
        "WITH c AS (SELECT infer(a) AS v, b FROM t) SELECT v, infer(b) FROM c WHERE b > 3",
        "SELECT infer(a), mine.infer(b) FROM t WHERE mine.infer(c) IS NULL",
        "SELECT 1 FROM t WHERE " + " AND ".join(f"infer(c{i}) IS NULL" for i in range(12)),
    ],
)
def test_a_statement_without_such_calls_is_run_as_it_is(statement: str) -> None:
    found = collectable(statement)
    assert found is not None
    assert found.sites is None


@pytest.mark.parametrize(
    ("call", "numbered"),
    [
        ("infer(b)", "infer(b, OURS)"),
        ("stratakv.infer(ARRAY[b, 'c'] /* , */ [1] -- )\n)", "stratakv.infer(ARRAY[b, 'c'] /* , */ [1] -- )\n, OURS)"),
        ('"infer"(prompt => b, model := $1)', '"infer"(prompt => b, model := $1, OURS)'),
        ("infer_json(b, '{}')", "infer_json(b, '{}', OURS)"),
        ("infer(b, 'm', NULL)", "infer(b, 'm', COALESCE((NULL), '{}'::pg_catalog.jsonb) OPERATOR(pg_catalog.||) SITE)"),
        (
            "infer_choice(b, $1, options => $2, model => 'm')",
            "infer_choice(b, $1, options => COALESCE(($2), '{}'::pg_catalog.jsonb) OPERATOR(pg_catalog.||) SITE,"
            " model => 'm')",
        ),
        ("infer_tokens(b)", "infer_tokens(b)"),
        ("infer(VARIADIC b)", "infer(VARIADIC b)"),
        ("infer()", "infer()"),
    ],
)
def test_a_call_carries_its_number_among_its_options(call: str, numbered: str) -> None:
    found = collectable(f"SELECT CASE WHEN infer(a) = '' THEN infer(z) ELSE {call} END FROM t")
    assert found is not None
    assert found.sites is not None
    ours = OPTIONS % 3
    expected = numbered.replace("OURS", ours).replace("SITE", ours.removeprefix("options => "))
    first, second = f"infer(a, {OPTIONS % 1})", f"infer(z, {OPTIONS % 2})"
    assert found.sites.select == f"SELECT CASE WHEN {first} = '' THEN {second} ELSE {expected} END FROM t"
