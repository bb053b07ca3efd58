"""infer_agg: what it gathers, what reaches the DB node, and that it is an aggregate like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors

from stratakv.errors import SetupError
from stratakv.sqlfunctions import install, uninstall
from tests.integration.sql.harness import FrontThread, ReversingModel

Connection = psycopg.Connection[tuple[Any, ...]]
LONG = """infer_agg('Sum up.', body, NULL, '{"delay_s": 30}')"""


@pytest.fixture
def session(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE t AS SELECT i, i % 3 AS g, 'text ' || i AS body FROM generate_series(1, 9) i")
        yield connection


def _asked(model: ReversingModel) -> list[Any]:
    return [json.loads(call.prompt) for call in model.calls]


def test_texts_of_a_group_arrive_together_in_the_order_asked_for(session: Connection, model: ReversingModel) -> None:
    query = "SELECT g, infer_agg('Sum up.', body ORDER BY i DESC) FROM t GROUP BY g ORDER BY g"
    rows = session.execute(query).fetchall()
    assert sorted(_asked(model), key=repr) == [
        {"instruction": "Sum up.", "pieces": [f"text {i}" for i in numbers]}
        for numbers in ([7, 4, 1], [8, 5, 2], [9, 6, 3])
    ]
    assert all(call.options == {"@fold": True} for call in model.calls)
    assert [(g, json.loads(answer[::-1])["pieces"][0]) for g, answer in rows] == [
        (0, "text 9"),
        (1, "text 7"),
        (2, "text 8"),
    ]


def test_groups_are_looked_ahead_for_together(session: Connection, model: ReversingModel) -> None:
    query = """SELECT g, infer_agg('Sum up.', body, NULL, '{"delay_s": 0.05}') FROM t GROUP BY g"""
    assert len(session.execute(query).fetchall()) == 3
    assert (len(model.calls), model.most_running) == (3, 3)


def test_array_of_texts_is_folded_like_those_of_an_aggregate(session: Connection, model: ReversingModel) -> None:
    session.execute(
        "SELECT infer_fold('Sum up.', array_agg(body ORDER BY i), options => '{\"seed\": 1}') FROM t WHERE i < 4"
    )
    session.execute("SELECT infer_fold('Sum up.', ARRAY['a', NULL, 'b'], 'm')")
    assert [asked["pieces"] for asked in _asked(model)] == [["text 1", "text 2", "text 3"], ["a", "b"]]
    assert [(call.model, call.options) for call in model.calls] == [
        (None, {"seed": 1, "@fold": True}),
        ("m", {"@fold": True}),
    ]
    for nothing in ("'x', NULL", "'x', '{}'", "'x', '{NULL}'", "NULL, '{a}'"):
        assert session.execute(f"SELECT infer_fold({nothing})").fetchone() == (None,)
    assert len(model.calls) == 2


def test_model_and_options_travel(session: Connection, model: ReversingModel) -> None:
    session.execute("SELECT infer_agg('x', body, 'm', '{\"max_tokens\": 9}') FROM t WHERE i = 1")
    session.execute("SELECT stratakv.infer_agg('x', body, 'm') FROM t WHERE i = 1")
    assert [(call.model, call.options) for call in model.calls] == [
        ("m", {"max_tokens": 9, "@fold": True}),
        ("m", {"@fold": True}),
    ]


def test_nulls_are_left_out_and_nothing_gives_null(session: Connection, model: ReversingModel) -> None:
    for query in (
        "SELECT infer_agg('x', NULL) FROM t",
        "SELECT infer_agg(NULL, body) FROM t",
        "SELECT infer_agg('x', body) FROM t WHERE false",
    ):
        assert session.execute(query).fetchone() == (None,)
    assert model.calls == []
    session.execute("SELECT infer_agg('x', CASE WHEN i = 4 THEN '' WHEN i % 2 = 0 THEN body END ORDER BY i) FROM t")
    assert _asked(model)[0]["pieces"] == ["text 2", "", "text 6", "text 8"]


def test_it_filters_windows_and_nests_like_an_aggregate(session: Connection, model: ReversingModel) -> None:
    query = "SELECT infer_agg('x', body) FILTER (WHERE i > 7), infer_agg('y', body) OVER (ORDER BY 1) IS NULL FROM t GROUP BY body"
    assert len(session.execute(query).fetchall()) == 9
    session.execute("CREATE VIEW sums AS SELECT g, infer_agg('x', infer(body) ORDER BY i) AS s FROM t GROUP BY g")
    rows = dict(session.execute("SELECT g, s FROM sums").fetchall())
    assert json.loads(rows[1][::-1])["pieces"] == ["1 txet", "4 txet", "7 txet"]


def test_cancel_and_timeout_reach_it(session: Connection, model: ReversingModel) -> None:
    session.execute("SET statement_timeout = '500ms'")
    with pytest.raises(errors.QueryCanceled):
        session.execute(f"SELECT {LONG} FROM t")
    session.execute("RESET statement_timeout")
    assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_group_that_is_too_long_is_refused(session: Connection, model: ReversingModel) -> None:
    with pytest.raises(errors.ProgramLimitExceeded, match="longer than"):
        session.execute("SELECT infer_agg('x', repeat('long ', 200000)) FROM t")
    with pytest.raises(errors.ProgramLimitExceeded, match="infer_agg"):
        session.execute("SELECT infer_agg('x', repeat('long ', 600000)) FROM t")
    assert model.calls == []


def test_ordinary_role_may_use_it(session: Connection) -> None:
    session.execute("CREATE ROLE agg_user; GRANT SELECT ON t TO agg_user; SET ROLE agg_user")
    try:
        assert session.execute("SELECT infer_agg('x', body) IS NOT NULL FROM t").fetchone() == (True,)
    finally:
        session.execute("RESET ROLE; DROP OWNED BY agg_user; DROP ROLE agg_user")


def test_name_that_is_taken_in_public_is_left_alone(direct_url: str, front: FrontThread) -> None:
    address = front.front.address
    uninstall(direct_url)
    with psycopg.connect(direct_url) as connection:
        connection.execute("CREATE FUNCTION public.infer_agg(text, text) RETURNS int LANGUAGE sql AS 'SELECT 1'")
    assert install(direct_url, address).names_taken == ("infer_agg",)
    uninstall(direct_url)
    with psycopg.connect(direct_url) as connection:
        assert connection.execute("SELECT infer_agg('a', 'b')").fetchone() == (1,)


def test_view_that_uses_it_holds_uninstall_back(direct_url: str) -> None:
    with psycopg.connect(direct_url) as connection:
        connection.execute("CREATE VIEW folded AS SELECT infer_agg('x', v) FROM (VALUES ('a')) t(v)")
    with pytest.raises(SetupError, match="folded"):
        uninstall(direct_url)
    uninstall(direct_url, cascade=True)
