"""The kin of infer(): what reaches the DB node, what comes back as which type, and which mistakes are told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors
from psycopg.types.json import Jsonb

from tests.integration.sql.harness import ReversingModel

Connection = psycopg.Connection[tuple[Any, ...]]
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}}


@pytest.fixture
def session(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def _one(session: Connection, query: str, *values: object) -> Any:
    row = session.execute(query.encode(), values).fetchone()
    assert row is not None
    return row[0]


def test_json_is_jsonb_and_the_schema_travels_with_the_options(session: Connection, model: ReversingModel) -> None:
    options = Jsonb({"answer": '{"age": 5}', "max_tokens": 9})
    answer = _one(session, "SELECT infer_json('How old?', %s, options => %s)", Jsonb(SCHEMA), options)
    assert answer == {"age": 5}
    assert model.calls[0].prompt == "How old?"
    assert model.calls[0].options == {"answer": '{"age": 5}', "max_tokens": 9, "@json_schema": SCHEMA}


def test_choice_is_text_and_takes_a_model(session: Connection, model: ReversingModel) -> None:
    options = Jsonb({"answer": "b"})
    assert _one(session, "SELECT infer_choice('x', ARRAY['a', 'b'], 'm', %s)", options) == "b"
    assert (model.calls[0].model, model.calls[0].options["@choices"]) == ("m", ["a", "b"])


@pytest.mark.parametrize(("answer", "value"), [("Yes", True), ("no", False), ("True", True), ("false", False)])
def test_bool_is_boolean(session: Connection, model: ReversingModel, answer: str, value: bool) -> None:
    assert _one(session, "SELECT infer_bool('x', options => %s)", Jsonb({"answer": answer})) is value
    assert answer in model.calls[0].options["@choices"]


def test_tokens_is_an_integer(session: Connection, model: ReversingModel) -> None:
    assert _one(session, "SELECT infer_tokens('41')") == 14
    assert model.calls[0].options == {"@count_tokens": True}


def test_row_takes_the_fields_without_a_place_of_their_own(session: Connection, model: ReversingModel) -> None:
    fields = Jsonb({"long": "multi\nline", "name": "Ada", "no": None, "list": [1, "x"], "x": 1.50, "tricky": "{*}"})
    lines = 'x: 1.5\nno: \nlist: [1, "x"]\nlong: multi\nline\n'
    for template, prompt in (
        ("About {name}: {{{*}}} Go on.", "About Ada: {" + lines + "tricky: {*}} Go on."),
        ("About {name}.", "About Ada."),
        ("Sum {{}} up.", "Sum {} up.\n" + lines + "name: Ada\ntricky: {*}"),
        ("{*}", lines + "name: Ada\ntricky: {*}"),
    ):
        _one(session, "SELECT infer_row(%s, %s, options => '{\"max_tokens\": 9}')", template, fields)
        assert (model.calls[-1].prompt, model.calls[-1].options) == (prompt, {"max_tokens": 9})
    _one(session, "SELECT infer_row('Say.', '{}')")
    assert model.calls[-1].prompt == "Say.\n"


def test_rows_of_a_statement_begin_alike_and_get_their_own_answers(session: Connection, model: ReversingModel) -> None:
    session.execute(
        "CREATE TABLE r AS SELECT 'n' || i AS a, 'long text ' || i % 4 AS body FROM generate_series(1, 40) i"
    )
    rows = session.execute(
        "SELECT a, body, infer_row('Say:', to_jsonb(r), options => '{\"delay_s\": 0.02}') FROM r"
    ).fetchall()
    prompts = [call.prompt for call in model.calls]
    assert set(prompts) == {f"Say:\nbody: {body}\na: {a}" for a, body, _ in rows}, "body is what repeats"
    assert prompts == sorted(prompts)
    assert len(prompts) == 40
    assert {answer[::-1] for _, _, answer in rows} == set(prompts)
    assert all(answer[::-1].endswith(f"body: {body}\na: {a}") for a, body, answer in rows)


def test_without_looking_ahead_fields_stand_as_jsonb_sorts_them(session: Connection, model: ReversingModel) -> None:
    session.execute("SET stratakv.hints = off")
    session.execute("SELECT infer_row('Say:', to_jsonb(r)) FROM (VALUES ('1', 'x'), ('2', 'x')) r(a, body)")
    assert sorted(call.prompt for call in model.calls) == ["Say:\na: 1\nbody: x", "Say:\na: 2\nbody: x"]


def test_row_that_nobody_filled_is_refused(session: Connection, model: ReversingModel) -> None:
    for prompt in (
        "x",
        "[]",
        '{"before": "a", "after": 1, "fields": {}}',
        '{"before": "", "after": "", "fields": {"a": 1}}',
    ):
        with pytest.raises(errors.InvalidParameterValue, match="@row"):
            session.execute("SELECT infer(%s, options => '{\"@row\": true}')", (prompt,))
    assert model.calls == []


def test_row_fills_the_template(session: Connection, model: ReversingModel) -> None:
    fields = Jsonb({"name": "Ada", "a b": None, "n": 1.5, "list": [1, "x"], "unused": "u", "tricky": "{name}"})
    template = "{{{name}}} {name}:{a b}:{n}:{list}:{tricky}"
    _one(session, "SELECT infer_row(%s, %s)", template, fields)
    assert model.calls[0].prompt == '{Ada} Ada::1.5:[1, "x"]:{name}'
    rows = session.execute(
        "SELECT infer_row('{word}!', to_jsonb(t)) FROM (VALUES ('ab'), ('cd')) t(word) ORDER BY 1"
    ).fetchall()
    assert rows == [("!ba",), ("!dc",)]


@pytest.mark.parametrize(
    ("text", "fields", "named"),
    [
        ("Say {nmae}.", {"name": 1}, r"\{nmae\}"),
        ("Say {}.", {"name": 1}, r"\{\}"),
        ("Say {name.", {"name": 1}, r"single \{"),
        ("Say name}.", {"name": 1}, r"single \}"),
        ("Say.", [1], "JSON object"),
        ("{*} {*}", {"name": 1}, "twice"),
    ],
)
def test_template_that_cannot_be_filled_is_refused_by_name(
    session: Connection, model: ReversingModel, text: str, fields: Any, named: str
) -> None:
    with pytest.raises(errors.InvalidParameterValue, match=named):
        _one(session, "SELECT infer_row(%s, %s)", text, Jsonb(fields))
    assert model.calls == []


@pytest.mark.parametrize(
    "call",
    [
        "infer_json(NULL, '{}')",
        "infer_choice(NULL, ARRAY['a'])",
        "infer_bool(NULL)",
        "infer_tokens(NULL)",
        "infer_row(NULL, '{}')",
        "infer_row('x', NULL)",
    ],
)
def test_null_prompt_gives_null(session: Connection, model: ReversingModel, call: str) -> None:
    assert _one(session, f"SELECT {call}") is None
    assert model.calls == []


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [
        ("infer_choice('x', NULL)", "@choices", []),
        ("infer_choice('x', '{}')", "@choices", []),
        ("infer_choice('x', ARRAY['a', NULL])", "@choices", ["a", None]),
        ("infer_json('x', NULL)", "@json_schema", []),
        ("infer_json('x', 'null')", "@json_schema", []),
    ],
)
def test_missing_form_never_means_any_answer(
    session: Connection, model: ReversingModel, call: str, name: str, value: object
) -> None:
    """The DB node refuses each of these values: tests/unit/dbnode/test_sql_inference.py."""
    with contextlib.suppress(errors.InvalidTextRepresentation):  # the stand-in's answer is no JSON
        session.execute(f"SELECT {call}".encode())
    assert model.calls[0].options == {name: value}


def test_options_that_are_no_object_are_refused(session: Connection, model: ReversingModel) -> None:
    for options in ("5", "[]", "null", '"x"'):
        with pytest.raises(errors.InvalidParameterValue, match="JSON object"):
            session.execute("SELECT infer_choice('x', ARRAY['a'], options => %s)", (options,))
    assert model.calls == []


def test_each_works_in_schema_stratakv_in_views_and_for_ordinary_roles(session: Connection) -> None:
    session.execute("CREATE VIEW answers AS SELECT stratakv.infer_bool('x', NULL, '{\"answer\": \"yes\"}') AS b")
    session.execute("CREATE ROLE typed_user; GRANT SELECT ON answers TO typed_user; SET ROLE typed_user")
    try:
        assert session.execute("SELECT * FROM answers").fetchall() == [(True,)]
        assert _one(session, "SELECT stratakv.infer_row('{a}', '{\"a\": \"bc\"}')") == "cb"
    finally:
        session.execute("RESET ROLE; DROP OWNED BY typed_user; DROP ROLE typed_user")


def test_hostile_search_path_changes_nothing(session: Connection, model: ReversingModel) -> None:
    session.execute(
        "CREATE SCHEMA trap;"
        "CREATE FUNCTION trap.join_json(jsonb, jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT ''{}''::jsonb';"
        "CREATE OPERATOR trap.|| (FUNCTION = trap.join_json, LEFTARG = jsonb, RIGHTARG = jsonb);"
        "CREATE FUNCTION trap.to_jsonb(text[]) RETURNS jsonb LANGUAGE sql AS 'SELECT NULL::jsonb';"
        "SET search_path = trap, public, pg_catalog"
    )
    session.execute("SELECT infer_choice('x', ARRAY['a'])")
    assert model.calls[0].options == {"@choices": ["a"]}


def test_wrappers_vanish_from_the_plan(session: Connection) -> None:
    """Inlined calls are what the look-ahead and EXPLAIN see."""
    rows = session.execute(
        "EXPLAIN (VERBOSE, FORMAT JSON) SELECT infer_choice(p, ARRAY['a']), infer_json(p, '{}'), infer_row('{p}', to_jsonb(t))"
        " FROM (VALUES ('x'), ('y')) t(p)"
    ).fetchall()
    plan = json.dumps(rows[0][0])
    assert plan.count("stratakv.infer(") == 3
    assert "infer_choice" not in plan
    assert "infer_json" not in plan


def test_comments_tell_what_each_is(session: Connection) -> None:
    silent = session.execute(
        "SELECT p.oid::regprocedure FROM pg_proc p WHERE proname LIKE 'infer%' AND pronamespace::regnamespace::text"
        " IN ('stratakv', 'public') AND obj_description(p.oid, 'pg_proc') IS NULL"
    ).fetchall()
    assert silent == []
