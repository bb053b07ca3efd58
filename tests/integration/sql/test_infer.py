"""infer() in every kind of statement, through the relay and without it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import errors

from stratakv.postgres import EmbeddedPostgres
from stratakv.sqlfunctions import install
from tests.integration.sql.harness import FrontThread, ReversingModel

Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture
def session(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def _psql(url: str, *commands: str) -> str:
    flags = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(["psql", url, "-XAt", *flags], capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""
    return done.stdout


def test_psql_gets_the_answer_through_the_relay(url: str) -> None:
    assert _psql(url, "SELECT infer('abc')") == "cba\n"


def test_direct_session_gets_the_answer(direct_url: str) -> None:
    with psycopg.connect(direct_url) as connection:
        assert connection.execute("SELECT stratakv.infer('abc')").fetchone() == ("cba",)


def test_null_prompt_gives_null_and_costs_nothing(session: Connection, model: ReversingModel) -> None:
    assert session.execute("SELECT infer(NULL)").fetchone() == (None,)
    assert model.calls == []


def test_text_of_any_script_and_length_comes_through(session: Connection) -> None:
    for prompt in ("", " ", "naïve ☕ 漢字 🙂", "line\nbreak\r\ttab\\'\"", "x" * 300_000):
        assert session.execute("SELECT infer(%s)", (prompt,)).fetchone() == (prompt[::-1],)


def test_call_says_who_asks_for_what(session: Connection, model: ReversingModel, database: str) -> None:
    session.execute("""SELECT infer('hi', 'tiny', '{"max_tokens": 3, "stop": ["a", "b"]}')""")
    call = model.calls[-1]
    assert (call.prompt, call.model, call.role, call.database) == ("hi", "tiny", "postgres", database)
    assert call.options == {"max_tokens": 3, "stop": ["a", "b"]}


def test_session_of_the_gateway_is_bound_and_a_direct_one_is_not(
    session: Connection, direct_url: str, model: ReversingModel
) -> None:
    session.execute("SELECT infer('a')")
    session.execute("SELECT infer('b')")
    with psycopg.connect(direct_url) as direct:
        direct.execute("SELECT infer('c')")
    first, second, third = (call.session for call in model.calls)
    assert first == second
    assert first.startswith("sql-")
    assert third.startswith("direct-")


def test_session_of_a_client_that_always_is_in_a_transaction_is_bound_in_its_first(
    url: str, model: ReversingModel
) -> None:
    with psycopg.connect(url) as connection:
        for _ in range(2):
            assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)
            connection.commit()
    assert [call.session.partition("-")[0] for call in model.calls] == ["sql", "sql"]


def test_binding_leaves_the_clients_unnamed_statement_alone(session: Connection) -> None:
    assert session.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
    assert session.execute("SELECT infer('ab'), count(*) FROM pg_prepared_statements").fetchone() == ("ba", 0)


def test_database_without_the_functions_works_as_usual(front: FrontThread) -> None:
    with psycopg.connect(front.url("postgres"), autocommit=True) as connection:
        assert connection.execute("SELECT 'infer' || 1").fetchone() == ("infer1",)
        with pytest.raises(errors.UndefinedFunction):
            connection.execute("SELECT infer('a')")
        assert connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
        assert connection.execute("SELECT 'infer' || 2").fetchone() == ("infer2",)


def test_every_kind_of_statement_gets_answers(session: Connection) -> None:
    session.execute("CREATE TABLE t AS SELECT i, 'row' || i AS body FROM generate_series(1, 5) i")
    session.execute("CREATE VIEW v AS SELECT i, infer(body) AS answer FROM t")
    assert session.execute("SELECT answer FROM v WHERE i = 2").fetchone() == ("2wor",)
    session.execute("CREATE TABLE t2 AS SELECT i, infer(body) AS answer FROM t")
    assert session.execute("SELECT count(*) FROM t2 WHERE answer LIKE '%wor'").fetchone() == (5,)
    updated = session.execute("UPDATE t SET body = infer(body) WHERE i < 3 RETURNING body").fetchall()
    assert sorted(updated) == [("1wor",), ("2wor",)]
    inserted = session.execute("INSERT INTO t SELECT 9, infer('new') RETURNING body").fetchone()
    assert inserted == ("wen",)
    session.execute("PREPARE p(text) AS SELECT infer($1)")
    assert session.execute("EXECUTE p('xyz')").fetchone() == ("zyx",)
    assert session.execute("SELECT infer(infer('twice'))").fetchone() == ("twice",)
    assert session.execute("SELECT i FROM t WHERE infer(body) = 'row1' ORDER BY i LIMIT 1").fetchone() == (1,)


def test_cursor_with_hold_outlives_its_transaction(session: Connection) -> None:
    with session.transaction():
        session.execute("DECLARE c CURSOR WITH HOLD FOR SELECT infer('n' || i) FROM generate_series(1, 3) i")
    assert session.execute("FETCH ALL c").fetchall() == [("1n",), ("2n",), ("3n",)]


def test_transactions_that_forbid_writing_allow_it(session: Connection) -> None:
    for mode in ("READ ONLY", "ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE", "ISOLATION LEVEL SERIALIZABLE"):
        with session.transaction():
            session.execute(f"SET TRANSACTION {mode}")
            assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_answers_go_on_after_discard_all(session: Connection, model: ReversingModel) -> None:
    for _ in range(2):
        assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)
        session.execute("DISCARD ALL")
    assert len({call.session for call in model.calls}) == 1


def test_parallel_plan_gets_answers(session: Connection) -> None:
    session.execute("CREATE TABLE big AS SELECT i FROM generate_series(1, 20000) i")
    session.execute("ANALYZE big; SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0")
    session.execute("SET min_parallel_table_scan_size = 0")
    query = "SELECT infer('r' || i) FROM big WHERE i % 5000 = 0 ORDER BY i"
    assert session.execute(query).fetchall() == [("0005r",), ("00001r",), ("00051r",), ("00002r",)]


def test_wrapper_is_inlined_and_cheap_predicates_go_first(session: Connection, model: ReversingModel) -> None:
    session.execute("CREATE TABLE t AS SELECT i, 'row' || i AS body FROM generate_series(1, 50) i")
    assert session.execute("SELECT i FROM t WHERE infer(body) = '7wor' AND i = 7").fetchone() == (7,)
    assert len(model.calls) == 1
    plan = session.execute("EXPLAIN (VERBOSE, COSTS OFF) SELECT public.infer(body) FROM t").fetchall()
    assert "Output: stratakv.infer(" in str(plan)


def test_error_of_the_model_reaches_the_client_whole(session: Connection) -> None:
    with pytest.raises(errors.InvalidParameterValue) as caught:
        session.execute("""SELECT infer('a', options => '{"fail": "temprature"}')""")
    assert caught.value.diag.message_primary == "the option temprature is wrong"
    assert caught.value.diag.message_hint == "Leave it out."
    assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_options_that_are_no_object_are_refused(session: Connection) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="must be a JSON object"):
        session.execute("SELECT infer('a', options => '[1]')")


def test_nul_in_an_answer_is_an_error_not_a_cut(session: Connection) -> None:
    with pytest.raises(errors.CharacterNotInRepertoire, match="NUL"):
        session.execute("""SELECT infer('a', options => '{"answer": "x<NUL>y"}')""")
    assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_prompt_over_the_limit_is_refused_by_its_limit(session: Connection, front: FrontThread) -> None:
    limit = front.settings.prompt_bytes_max
    assert session.execute("SELECT length(infer(repeat('x', %s)))", (limit,)).fetchone() == (limit,)
    for size in (limit + 1, 3 * limit):
        with pytest.raises(errors.ProgramLimitExceeded, match=str(limit)):
            session.execute("SELECT infer(repeat('x', %s))", (size,))
    assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)


@pytest.fixture
def latin1_url(cluster: EmbeddedPostgres, front: FrontThread) -> Iterator[str]:
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' LOCALE_PROVIDER libc TEMPLATE template0")
        install(cluster.database_url("latin"), front.front.address)
        yield front.url("latin")
        connection.execute("DROP DATABASE latin WITH (FORCE)")


def test_latin1_database_gets_what_it_can_hold_and_a_clear_error_for_the_rest(latin1_url: str) -> None:
    with psycopg.connect(latin1_url, autocommit=True, client_encoding="UTF8") as connection:
        assert connection.execute("SELECT infer('äbc')").fetchone() == ("cbä",)
        with pytest.raises(errors.UntranslatableCharacter):
            connection.execute("""SELECT infer('a', options => '{"answer": "\\u6f22"}')""")
        connection.execute("SET client_encoding = 'LATIN1'")
        assert connection.execute("SELECT infer('äb')").fetchone() == ("bä",)


@pytest.fixture
def ascii_url(cluster: EmbeddedPostgres, front: FrontThread) -> Iterator[str]:
    """A database that takes any bytes."""
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as connection:
        connection.execute(
            "CREATE DATABASE bytes ENCODING 'SQL_ASCII' LOCALE 'C' LOCALE_PROVIDER libc TEMPLATE template0"
        )
        install(cluster.database_url("bytes"), front.front.address)
        yield front.url("bytes")
        connection.execute("DROP DATABASE bytes WITH (FORCE)")


def test_bytes_that_are_no_utf8_are_refused_and_the_session_goes_on(ascii_url: str, model: ReversingModel) -> None:
    with psycopg.connect(ascii_url, autocommit=True, client_encoding="SQL_ASCII") as connection:
        assert connection.execute("SELECT infer('ab')").fetchone() == (b"ba",)
        with pytest.raises(errors.CharacterNotInRepertoire, match="invalid byte sequence"):
            connection.execute(b"SELECT infer('x\xe4')")
        connection.execute(b'CREATE ROLE "r\xe4"; GRANT USAGE ON SCHEMA stratakv TO "r\xe4"; SET ROLE "r\xe4"')
        model.calls.clear()
        try:
            with pytest.raises(errors.CharacterNotInRepertoire, match="invalid byte sequence"):
                connection.execute("SELECT infer('a')")
            assert model.calls == []
        finally:
            connection.execute(b'RESET ROLE; DROP OWNED BY "r\xe4"; DROP ROLE "r\xe4"')
        assert connection.execute("SELECT infer('ab')").fetchone() == (b"ba",)
