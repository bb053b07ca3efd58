"""Rows go to the client as soon as theirs are ready."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.integration.sql.harness import SLOW, ReversingModel, outcome

Connection = psycopg.Connection[tuple[object, ...]]


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
    expected = outcome(connection.cursor(), query.format(f="pg_catalog.reverse"))
    connection.execute("SET stratakv.stream = on")
    assert outcome(connection.cursor(), query.format(f="infer")) == expected
    assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)
