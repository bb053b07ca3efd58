"""What ends a wait for the model, and what goes on meanwhile."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import errors

from tests.integration.sql.harness import MANY, SLOW, VERY_SLOW, FrontThread, ReversingModel
from tests.support import eventually

Connection = psycopg.Connection[tuple[object, ...]]


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


@pytest.mark.parametrize("within", ["", "BEGIN"])
def test_a_cancel_from_elsewhere_that_hits_a_pass_is_the_statements_own(
    url: str, direct_url: str, model: ReversingModel, within: str
) -> None:
    nap = "CREATE FUNCTION nap(i int) RETURNS text LANGUAGE plpgsql STABLE AS $$BEGIN PERFORM pg_sleep(0.5); RETURN i; END$$"
    with (
        psycopg.connect(direct_url, autocommit=True) as other,
        psycopg.connect(url, autocommit=True) as connection,
        ThreadPoolExecutor(1) as pool,
    ):
        other.execute(nap.encode())
        connection.execute("SELECT infer('bind')")
        connection.execute(within.encode())
        running = pool.submit(connection.execute, "SELECT infer(nap(i)) FROM generate_series(1, 60) i")
        pid = connection.info.backend_pid
        is_in_pass = "SELECT query LIKE 'SELECT infer(nap%%' FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
        eventually(lambda: other.execute(is_in_pass, (pid,)).fetchone() == (True,))
        other.execute("SELECT pg_cancel_backend(%s)", (pid,))
        with pytest.raises(errors.QueryCanceled, match="user request"):
            running.result()
        assert [call.prompt for call in model.calls] == ["bind"]
        connection.execute("ROLLBACK")
        assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


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
