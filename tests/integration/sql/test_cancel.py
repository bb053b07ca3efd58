"""What ends a statement ends its inference, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import errors

from dbnode.sql.messages import cstring, int32, message
from tests.integration.sql.harness import ReversingModel
from tests.support import eventually

LONG = """SELECT infer('long', options => '{"delay_s": 60}')"""
STOPPED_WITHIN_S = 5.0
"""A bound for a busy machine; idle it takes a fifth of a second."""

Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture(params=["relayed", "direct"])
def session_url(request: pytest.FixtureRequest, url: str, direct_url: str) -> str:
    return url if request.param == "relayed" else direct_url


@pytest.fixture(params=["plain", "view", "transaction"])
def run_long(request: pytest.FixtureRequest) -> Callable[[Connection], None]:
    """Runs a statement that waits for the model, named or hidden."""

    def run(connection: Connection) -> None:
        connection.execute(f"CREATE OR REPLACE VIEW hidden AS {LONG}")
        if request.param == "transaction":
            with connection.transaction():
                connection.execute(LONG)
        else:
            connection.execute("SELECT * FROM hidden" if request.param == "view" else LONG)

    return run


def _stopped(model: ReversingModel) -> None:
    eventually(lambda: model.running == 0, timeout_s=STOPPED_WITHIN_S, what="the inference stopped")


def test_cancel_stops_the_inference_and_the_session_goes_on(
    session_url: str, model: ReversingModel, run_long: Callable[[Connection], None]
) -> None:
    with psycopg.connect(session_url, autocommit=True) as connection, ThreadPoolExecutor() as pool:
        waiting = pool.submit(run_long, connection)
        eventually(lambda: model.running == 1)
        connection.cancel_safe(timeout=10)
        with pytest.raises(errors.QueryCanceled, match="due to user request"):
            waiting.result(STOPPED_WITHIN_S)
        _stopped(model)
        assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_statement_timeout_stops_the_inference_and_the_session_goes_on(
    session_url: str, model: ReversingModel, run_long: Callable[[Connection], None]
) -> None:
    with psycopg.connect(session_url, autocommit=True) as connection:
        connection.execute("SET statement_timeout = '200ms'")
        with pytest.raises(errors.QueryCanceled, match="statement timeout"):
            run_long(connection)
        _stopped(model)
        assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_control_c_in_psql_stops_the_inference(url: str, model: ReversingModel) -> None:
    with subprocess.Popen(["psql", url, "-Xc", LONG], stderr=subprocess.PIPE) as process:
        eventually(lambda: model.running == 1)
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=STOPPED_WITHIN_S)
    assert b"canceling statement due to user request" in stderr
    _stopped(model)


@pytest.mark.parametrize("query", [LONG, "SELECT * FROM hidden"], ids=["bound", "unbound"])
def test_client_that_disappears_stops_its_inference_and_its_backend(
    url: str, direct_url: str, model: ReversingModel, query: str
) -> None:
    with psycopg.connect(direct_url, autocommit=True) as observer:
        observer.execute(f"CREATE VIEW hidden AS {LONG}")
        lost = psycopg.connect(url, autocommit=True)
        pid = lost.info.backend_pid
        socket_copy = socket.socket(fileno=os.dup(lost.fileno()))
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(lost.execute, query)
            eventually(lambda: model.running == 1)
            socket_copy.shutdown(socket.SHUT_RDWR)
            with pytest.raises(psycopg.OperationalError):
                waiting.result(STOPPED_WITHIN_S)
        _stopped(model)
        gone = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
        eventually(lambda: observer.execute(gone, (pid,)).fetchone() == (0,), what="the backend ended")


def test_client_that_disappears_lets_ordinary_work_finish(url: str, direct_url: str) -> None:
    with psycopg.connect(direct_url, autocommit=True) as observer:
        observer.execute("CREATE TABLE t (i int)")
        with socket.create_connection(("127.0.0.1", psycopg.conninfo.conninfo_to_dict(url)["port"])) as raw:
            _log_in(raw, str(psycopg.conninfo.conninfo_to_dict(url)["dbname"]))
            raw.sendall(message(b"Q", cstring("INSERT INTO t SELECT 1 FROM pg_sleep(0.5)")))
        eventually(lambda: observer.execute("SELECT count(*) FROM t").fetchone() == (1,))


def _log_in(raw: socket.socket, database: str) -> None:
    parameters = b"".join(cstring(text) for text in ("user", "postgres", "database", database)) + b"\0"
    raw.sendall(int32(8 + len(parameters)) + int32(196608) + parameters)
    received = b""
    while not received.endswith(b"Z\0\0\0\5I"):
        received += raw.recv(65536)


def test_backend_that_is_killed_ends_the_session_with_its_own_message(
    url: str, direct_url: str, model: ReversingModel
) -> None:
    with psycopg.connect(direct_url, autocommit=True) as other, ThreadPoolExecutor() as pool:
        connection = psycopg.connect(url, autocommit=True)
        waiting = pool.submit(connection.execute, LONG)
        eventually(lambda: model.running == 1)
        other.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))
        with pytest.raises(errors.AdminShutdown, match="administrator command"):
            waiting.result(STOPPED_WITHIN_S)
        _stopped(model)


def test_cancel_with_a_wrong_key_changes_nothing(url: str, model: ReversingModel) -> None:
    with psycopg.connect(url, autocommit=True) as connection, ThreadPoolExecutor() as pool:
        waiting = pool.submit(
            connection.execute, """SELECT infer('ab', options => '{"delay_s": 0.5}') WHERE pg_backend_pid() > 0"""
        )
        eventually(lambda: model.running == 1)
        with socket.create_connection((connection.info.host, connection.info.port)) as raw:
            raw.sendall(int32(16) + int32((1234 << 16) | 5678) + int32(connection.info.backend_pid) + b"\1\2\3\4")
            assert raw.recv(1) == b""
        assert waiting.result(STOPPED_WITHIN_S).fetchone() == ("ba",)
