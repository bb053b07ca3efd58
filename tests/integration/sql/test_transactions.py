"""Looking ahead within a client's transaction leaves the transaction as it was."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import asyncpg
import psycopg
import pytest
from psycopg import IsolationLevel, errors

from dbnode.sql.hints import HintStats
from dbnode.sql.messages import cstring, int16, int32, message
from tests.integration.sql.harness import MANY, SLOW, VERY_SLOW, FrontThread, ReversingModel
from tests.integration.sql.raw_client import RawClient
from tests.support import eventually

ALL = f"SELECT infer(body, {SLOW}) FROM t"
Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture(params=[psycopg.Cursor, psycopg.ClientCursor], ids=["extended", "simple"])
def connection(request: pytest.FixtureRequest, url: str, direct_url: str) -> Iterator[Connection]:
    """As psycopg opens it: each statement is in a transaction block. Nothing has bound the session yet."""
    with psycopg.connect(direct_url) as opened:
        opened.execute("CREATE TABLE t AS SELECT i, 'text ' || i AS body FROM generate_series(1, 60) i")
    with psycopg.connect(url, cursor_factory=request.param) as opened:
        yield opened


@pytest.mark.parametrize("level", list(IsolationLevel))
def test_the_first_statement_of_a_session_is_looked_ahead_in(
    connection: Connection, model: ReversingModel, stats: Callable[[], HintStats], level: IsolationLevel
) -> None:
    connection.isolation_level = level
    assert len(connection.execute(ALL).fetchall()) == 60
    assert model.most_running > MANY
    assert len(model.calls) == 60
    connection.execute("INSERT INTO t VALUES (61, 'more')")
    connection.commit()
    eventually(lambda: (stats().distinct, stats().consumed, stats().wasted) == (60, 60, 0))


def test_a_pass_sees_the_rows_of_its_transaction(connection: Connection, model: ReversingModel) -> None:
    connection.execute("UPDATE t SET body = 'new ' || i")
    rows = connection.execute(f"SELECT infer('<' || infer(body, {SLOW}), {SLOW}) FROM t").fetchall()
    assert sorted(rows) == sorted((f"new {i}<",) for i in range(1, 61))
    assert model.most_running > MANY
    assert len(model.calls) == 120


def test_the_transaction_is_as_it_was(connection: Connection, model: ReversingModel) -> None:
    connection.execute("SET LOCAL statement_timeout = '20s'")
    connection.execute("SAVEPOINT mine")
    connection.execute("CREATE TEMP TABLE kept (answer text) ON COMMIT DROP")
    connection.execute(f"INSERT INTO kept SELECT infer(body, {SLOW}) FROM t")
    assert model.most_running > MANY
    shown = [
        connection.execute(f"SHOW {name}").fetchone()
        for name in ("statement_timeout", "transaction_read_only", "synchronize_seqscans")
    ]
    assert shown == [("20s",), ("off",), ("on",)]
    named = "SELECT (SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'strata%'), count(*) FROM pg_cursors"
    assert connection.execute(named + " WHERE name LIKE 'strata%'").fetchone() == (0, 0)
    with pytest.raises(errors.InvalidSavepointSpecification):
        connection.execute("ROLLBACK TO SAVEPOINT stratakv_gateway")
    connection.execute("ROLLBACK TO SAVEPOINT mine")
    assert connection.execute("SELECT to_regclass('kept')").fetchone() == (None,)


def test_a_transaction_that_reads_only_stays_so(connection: Connection, model: ReversingModel) -> None:
    connection.read_only = True
    connection.execute(ALL)
    assert model.most_running > MANY
    with pytest.raises(errors.ReadOnlySqlTransaction):
        connection.execute("INSERT INTO t VALUES (0, 'x')")


def test_a_pass_takes_no_transaction_number(connection: Connection) -> None:
    connection.execute(ALL)
    assert connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchone() == (None,)


def test_deferred_constraints_wait_for_the_commit(connection: Connection, model: ReversingModel) -> None:
    connection.execute("CREATE TABLE parent (i int PRIMARY KEY)")
    connection.execute("CREATE TABLE child (i int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    connection.execute("INSERT INTO child VALUES (1)")
    assert len(connection.execute(ALL).fetchall()) == 60
    assert model.most_running > MANY
    connection.execute("INSERT INTO parent VALUES (1)")
    connection.commit()


def test_open_cursors_stay_where_they_are(connection: Connection, model: ReversingModel) -> None:
    connection.execute("DECLARE c CURSOR FOR SELECT i FROM t ORDER BY i")
    assert connection.execute("FETCH 2 FROM c").fetchall() == [(1,), (2,)]
    connection.execute(ALL)
    assert model.most_running > MANY
    assert connection.execute("FETCH 2 FROM c").fetchall() == [(3,), (4,)]


def test_a_failed_statement_is_failed_and_the_savepoint_mends_it(connection: Connection) -> None:
    connection.execute("SAVEPOINT mine")
    for statement in (
        "SELECT infer(body) / 0 FROM t",
        "SELECT infer(nothing) FROM t",
        "SELECT infer(body), 1 / (i - 3) FROM t",
    ):
        with pytest.raises(psycopg.Error) as raised:
            connection.execute(statement)
        assert raised.value.sqlstate in ("42883", "42703", "22012")
        with pytest.raises(errors.InFailedSqlTransaction):
            connection.execute(ALL)
        connection.execute("ROLLBACK TO mine")
    assert len(connection.execute(ALL).fetchall()) == 60


def test_a_prepared_transaction_is_prepared(connection: Connection, model: ReversingModel) -> None:
    connection.execute("CREATE TABLE kept (answer text)")
    connection.execute(f"INSERT INTO kept SELECT infer(body, {SLOW}) FROM t")
    assert model.most_running > MANY
    if connection.execute("SHOW max_prepared_transactions").fetchone() == ("0",):
        with pytest.raises(errors.ObjectNotInPrerequisiteState):
            connection.execute("PREPARE TRANSACTION 'both'")
        return
    connection.execute("PREPARE TRANSACTION 'both'")
    connection.autocommit = True
    connection.execute("ROLLBACK PREPARED 'both'")


async def test_asyncpg_is_looked_ahead_for_in_its_first_transaction(url: str, front: FrontThread) -> None:
    connection = await asyncpg.connect(url)
    try:
        for text in ("ab", "cd"):
            front.model.most_running = 0
            async with connection.transaction():
                query = f"SELECT infer($1 || i, {SLOW}) AS answer FROM generate_series(1, 40) i"
                rows = await connection.fetch(query, text)
            assert [row["answer"] for row in rows] == [f"{text}{i}"[::-1] for i in range(1, 41)]
            assert front.model.most_running > MANY
    finally:
        await connection.close()


def test_the_unnamed_statement_and_portals_survive(
    front: FrontThread, database: str, stats: Callable[[], HintStats]
) -> None:
    ready = b"Z\0\0\0\5T"
    query = "SELECT infer('p' || i) FROM generate_series(1, 3) i"
    execute, sync = message(b"E", cstring("") + int32(1)), message(b"S")
    with RawClient(front.settings.port) as client:
        client.log_in(database)
        client.send(message(b"Q", cstring("BEGIN")))
        client.read_until(ready)
        client.send(message(b"P", cstring("") + cstring("VALUES ('one'), ('two')") + int16(0)))
        client.send(message(b"B", cstring("") + cstring("") + int16(0) * 3) + execute + sync)
        assert b"one" in client.read_until(ready)
        client.send(message(b"P", cstring("mine") + cstring(query) + int16(0)))
        client.send(message(b"B", cstring("portal") + cstring("mine") + int16(0) * 3))
        client.send(message(b"E", cstring("portal") + int32(0)) + sync)
        assert b"3p" in client.read_until(ready)
        client.send(execute + sync)
        assert b"two" in client.read_until(ready)
    assert stats().passes == 1


# Waiting


@pytest.mark.parametrize("setting", ["idle_in_transaction_session_timeout", "transaction_timeout"])
def test_the_gateway_waits_no_longer_than_the_session_may_be_idle(
    connection: Connection, model: ReversingModel, setting: str
) -> None:
    if setting == "transaction_timeout" and connection.info.server_version < 170000:
        pytest.skip("this server does not know it")
    connection.execute(f"SET LOCAL {setting} = '1500ms'")
    query = """SELECT infer(body, options => '{"delay_s": 2}') FROM t"""
    if setting == "transaction_timeout":
        with pytest.raises(psycopg.Error, match="transaction timeout"):
            connection.execute(query)
        eventually(lambda: model.running == 0)
    else:
        assert len(connection.execute(query).fetchall()) == 60
    assert model.most_running > MANY


def test_cancel_while_the_model_works_fails_the_statement(connection: Connection, model: ReversingModel) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(connection.execute, f"SELECT infer(body, {VERY_SLOW}) FROM t")
        eventually(lambda: model.running > MANY)
        connection.cancel_safe()
        with pytest.raises(errors.QueryCanceled):
            running.result()
    eventually(lambda: model.running == 0)
    connection.rollback()
    assert len(connection.execute(ALL).fetchall()) == 60


def test_cancel_ends_a_pass(connection: Connection, direct_url: str) -> None:
    connection.execute("SELECT infer('bind')")
    with ThreadPoolExecutor(1) as pool:
        connection.execute("CREATE FUNCTION nap() RETURNS void LANGUAGE sql STABLE AS $$ SELECT pg_sleep(20) $$")
        running = pool.submit(connection.execute, "SELECT infer(body) FROM t WHERE nap() IS NOT NULL")
        query = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid = %s"
        with psycopg.connect(direct_url, autocommit=True) as other:
            eventually(lambda: other.execute(query, (connection.info.backend_pid,)).fetchone() == (1,))
        connection.cancel_safe()
        with pytest.raises(errors.QueryCanceled, match="user request"):
            running.result(10)


def test_cancels_that_hit_a_statement_of_the_gateway_are_the_statements_own(url: str, direct_url: str) -> None:
    right = [(f"p{i}"[::-1],) for i in range(1, 101)]
    query = "SELECT infer('p' || i) FROM generate_series(1, 1000) i LIMIT 100"
    ended = threading.Event()
    with psycopg.connect(url) as connection, ThreadPoolExecutor(1) as pool:

        def disturb(pid: int) -> None:
            with psycopg.connect(direct_url, autocommit=True) as other:
                while not ended.wait(0.003):
                    other.execute("SELECT pg_cancel_backend(%s)", (pid,))

        disturbing = pool.submit(disturb, connection.info.backend_pid)
        try:
            for _ in range(40):
                with contextlib.suppress(errors.QueryCanceled):
                    connection.execute("SAVEPOINT mine")
                    assert connection.execute(query).fetchall() == right
                while connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                    with contextlib.suppress(errors.QueryCanceled):
                        connection.rollback()
        finally:
            ended.set()
        disturbing.result()
        assert connection.execute(query).fetchall() == right


# What is remembered


def test_a_transaction_asks_once(connection: Connection, model: ReversingModel) -> None:
    for _ in range(2):
        assert len(connection.execute(ALL).fetchall()) == 60
        connection.execute(f"SELECT infer('text 1', {SLOW})")
    assert len(model.calls) == 60
    connection.commit()
    connection.execute(f"SELECT infer('text 1', {SLOW})")
    assert len(model.calls) == 61


def test_a_retry_after_a_serialization_failure_is_free(url: str, direct_url: str, model: ReversingModel) -> None:
    with psycopg.connect(direct_url) as opened:
        opened.execute("CREATE TABLE t AS SELECT i, 'text ' || i AS body FROM generate_series(1, 60) i")
    with psycopg.connect(url) as connection, psycopg.connect(direct_url) as other:
        connection.isolation_level = IsolationLevel.REPEATABLE_READ
        for attempt in range(2):
            rows = connection.execute(ALL).fetchall()
            assert sorted(rows) == sorted((f"text {i}"[::-1],) for i in range(1, 61))
            connection.execute("SELECT infer('one more')")
            if attempt == 0:
                other.execute("UPDATE t SET i = 0 WHERE i = 1")
                other.commit()
                with pytest.raises(errors.SerializationFailure):
                    connection.execute("UPDATE t SET i = -1 WHERE i = 1")
                connection.rollback()
        assert len(model.calls) == 61


def test_what_is_drawn_by_lot_is_not_remembered(connection: Connection, model: ReversingModel) -> None:
    for options in ('{"temperature": 1}', '{"dedupe": false}'):
        for _ in range(2):
            connection.execute(f"SELECT infer('a', options => '{options}')")
    assert len(model.calls) == 4
