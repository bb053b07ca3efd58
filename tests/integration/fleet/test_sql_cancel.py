"""What ends a statement frees its KV in the worker, and its session goes on: a real DB node over a real engine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from dbnode.sql.messages import cstring, int16, int32, message
from stratakv import migrate
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import SqlSettings
from stratakv.sqlfunctions import ListenerAddress, install
from tests.integration.fleet.conftest import CACHE_DIR
from tests.integration.fleet.processes import Fleet, Worker
from tests.integration.sql.raw_client import RawClient
from tests.service_process import ServiceProcess
from tests.support import eventually, free_port

START_S = 90.0
STOPPED_WITHIN_S = 10.0
"""A bound for a busy machine; idle it takes a fifth of a second and the step that runs."""
PROMPT = "'Count from one to ten thousand, one number in each line.'"
OPTIONS = """options => '{"max_tokens": 2000}'"""
ONE = f"SELECT infer({PROMPT}, {OPTIONS})"
MANY = f"SELECT infer({PROMPT} || i, {OPTIONS}) FROM generate_series(1, 4) i"
"""The DB node holds this one back while it asks for all four."""
Connection = psycopg.Connection[tuple[object, ...]]


@dataclass(frozen=True)
class Stack:
    """Where clients connect to, directly and through the DB node, and the worker behind."""

    url: str
    direct_url: str
    worker: Worker

    @property
    def num_running(self) -> int:
        load = self.worker.get("/load")
        return int(load.get("running", 0)) + int(load.get("waiting", 0))

    def has_freed_everything(self) -> bool:
        """What no request refers to is dropped first; what is left then, one does."""
        self.worker.drop("l1")
        load = self.worker.get("/load")
        return self.num_running == 0 and load["l1_blocks_total"] == load.get("l1_blocks_free")


@pytest.fixture(scope="module")
def stack(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory, tokenizer: object) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("sql_cancel")
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE sql_cancel")
    database_url = postgres.database_url("sql_cancel")
    migrate.upgrade(database_url)
    with tempfile.TemporaryDirectory(prefix="skv-") as name:
        Path(name).chmod(0o711)
        fleet = Fleet(database_url, home)
        worker = fleet.worker("sql", "--pool-enabled", "false", "--l1-tokens", "16384")
        sql_port, rest_port = free_port(), free_port()
        values = {
            "sql.port": sql_port,
            "sql.listener_dir": name,
            "sql.backend_trusted": "true",
            "sql.backend_uid": postgres.uid,
            "rest.port": rest_port,
            "router.workers": worker.url,
            "router.refresh_s": 0.1,
            "model.cache_dir": CACHE_DIR,
        }
        flags = [f"--set={key}={value}" for key, value in values.items()]
        node = ServiceProcess("dbnode", flags, fleet.env, home / "dbnode.log")
        install(database_url, ListenerAddress.from_settings(SqlSettings(listener_dir=Path(name))))
        node.start()
        try:
            eventually(worker.is_ready, timeout_s=START_S, what="the worker is ready")
            eventually(lambda: _is_ready(node, rest_port), timeout_s=START_S, what="the DB node is ready")
            yield Stack(make_conninfo(database_url, host="127.0.0.1", port=sql_port), database_url, worker)
        finally:
            node.stop()
            fleet.stop()


def _is_ready(node: ServiceProcess, port: int) -> bool:
    assert not node.has_ended(), node.log_tail()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(params=["one", "looked ahead", "direct", "in a transaction", "several in a query"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def session(stack: Stack, way: str) -> Iterator[Connection]:
    assert stack.has_freed_everything()
    url = stack.direct_url if way == "direct" else stack.url
    with contextlib.closing(psycopg.connect(url, autocommit=True)) as connection:
        yield connection


def _statement(way: str) -> str:
    if way == "several in a query":
        return f"SELECT 1; {ONE}; SELECT 2"
    return MANY if way in ("looked ahead", "in a transaction") else ONE


def _run(connection: Connection, way: str) -> None:
    context = connection.transaction() if way == "in a transaction" else contextlib.nullcontext()
    with context:
        connection.execute(_statement(way).encode())


def _freed(stack: Stack) -> None:
    eventually(stack.has_freed_everything, timeout_s=STOPPED_WITHIN_S, what="the worker has freed the KV")


def _goes_on(connection: Connection) -> None:
    row = connection.execute("""SELECT infer('Hello', options => '{"max_tokens": 1}')""").fetchone()
    assert row is not None
    assert row[0]


def _cancel_by_client(stack: Stack, connection: Connection) -> None:
    connection.cancel_safe(timeout=STOPPED_WITHIN_S)


def _cancel_by_administrator(stack: Stack, connection: Connection) -> None:
    with psycopg.connect(stack.direct_url, autocommit=True) as admin:
        admin.execute("SELECT pg_cancel_backend(%s)", (connection.info.backend_pid,))


@pytest.mark.parametrize("cancel", [_cancel_by_client, _cancel_by_administrator])
def test_cancel_frees_the_kv_and_the_session_goes_on(
    stack: Stack, session: Connection, way: str, cancel: Callable[[Stack, Connection], None]
) -> None:
    if cancel is _cancel_by_administrator and way in ("looked ahead", "in a transaction"):
        pytest.skip("PostgreSQL runs nothing while the DB node waits for the model: there is nothing to cancel")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(_run, session, way)
        eventually(lambda: stack.num_running)
        cancel(stack, session)
        with pytest.raises(psycopg.errors.QueryCanceled):
            waiting.result(STOPPED_WITHIN_S)
    _freed(stack)
    _goes_on(session)


def test_statement_timeout_frees_the_kv_and_the_session_goes_on(stack: Stack, session: Connection, way: str) -> None:
    session.execute("SET statement_timeout = '250ms'")
    with pytest.raises(psycopg.errors.QueryCanceled, match="statement timeout"):
        _run(session, way)
    _freed(stack)
    session.execute("RESET statement_timeout")
    _goes_on(session)


def test_backend_that_is_terminated_frees_the_kv(stack: Stack, session: Connection, way: str) -> None:
    with ThreadPoolExecutor() as pool, psycopg.connect(stack.direct_url, autocommit=True) as admin:
        waiting = pool.submit(_run, session, way)
        eventually(lambda: stack.num_running)
        admin.execute("SELECT pg_terminate_backend(%s)", (session.info.backend_pid,))
        with pytest.raises(psycopg.OperationalError):
            waiting.result(STOPPED_WITHIN_S)
    _freed(stack)


def test_client_that_is_killed_frees_the_kv(stack: Stack, session: Connection, way: str) -> None:
    if way in ("direct", "in a transaction"):
        pytest.skip("PostgreSQL itself looks for its client only between statements")
    with subprocess.Popen(["psql", stack.url, "-Xqc", _statement(way)], stdout=subprocess.DEVNULL) as process:
        eventually(lambda: stack.num_running)
        os.kill(process.pid, signal.SIGKILL)
    _freed(stack)


def test_client_that_disappears_from_a_suspended_portal_frees_the_kv(stack: Stack) -> None:
    assert stack.has_freed_everything()
    port = int(psycopg.conninfo.conninfo_to_dict(stack.url)["port"])
    first = """CASE WHEN i = 1 THEN 'first' ELSE infer('Count to ten thousand. ' || i, options => '{"max_tokens": 2000}') END"""
    query = f"SELECT {first} FROM generate_series(1, 3) i"
    with RawClient(port) as client:
        client.log_in("sql_cancel")
        parse = message(b"P", cstring("") + cstring(query) + int16(0))
        bind = message(b"B", cstring("") + cstring("") + int16(0) + int16(0) + int16(0))
        client.send(message(b"Q", cstring("BEGIN")))
        client.read_until(b"Z\0\0\0\5T")
        client.send(parse + bind + message(b"E", cstring("") + int32(1)) + message(b"H"))
        client.read_until(message(b"s"))
        client.send(message(b"E", cstring("") + int32(1)) + message(b"H"))
        eventually(lambda: stack.num_running)
        client.socket.shutdown(socket.SHUT_RDWR)
    _freed(stack)
