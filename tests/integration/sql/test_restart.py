"""A DB node that stops, drains or dies leaves no session of PostgreSQL behind with a dead connection."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from stratakv.postgres import EmbeddedPostgres
from stratakv.sqlfunctions import install
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread
from tests.support import eventually

SLOW = """SELECT infer('slow', options => '{"delay_s": 1}')"""
LONG = """SELECT infer('long', options => '{"delay_s": 60}')"""


@pytest.fixture
def own(cluster: EmbeddedPostgres, database: str, tmp_path: Path) -> Iterator[FrontThread]:
    """A face of the test's own, installed in the test's database."""
    tmp_path.chmod(0o711)
    install(cluster.database_url(database), address_in(tmp_path))
    with front_thread(cluster, tmp_path, ReversingModel(), drain_grace_s=10.0) as running:
        yield running


def test_direct_session_goes_on_after_a_restart_of_the_node(
    own: FrontThread, cluster: EmbeddedPostgres, database: str
) -> None:
    with psycopg.connect(cluster.database_url(database), autocommit=True) as session:
        assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)
        for _ in range(2):
            own.stop()
            with pytest.raises(errors.SqlclientUnableToEstablishSqlconnection):
                session.execute("SELECT infer('ab')")
            own.start()
            assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)
            own.stop()
            own.start()
            assert session.execute("SELECT infer('cd')").fetchone() == ("dc",)


def test_call_in_progress_is_told_when_the_node_ends(
    own: FrontThread, cluster: EmbeddedPostgres, database: str
) -> None:
    with psycopg.connect(cluster.database_url(database), autocommit=True) as session, ThreadPoolExecutor() as pool:
        waiting = pool.submit(session.execute, LONG)
        eventually(lambda: own.model.running == 1)
        own.stop()
        with pytest.raises((errors.CannotConnectNow, errors.SqlclientUnableToEstablishSqlconnection)):
            waiting.result(20)
        own.start()
        assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_drain_closes_idle_sessions_and_lets_statements_finish(own: FrontThread, database: str) -> None:
    with ThreadPoolExecutor() as pool:
        idle = psycopg.connect(own.url(database), autocommit=True)
        busy = psycopg.connect(own.url(database), autocommit=True)
        in_transaction = psycopg.connect(own.url(database))
        in_transaction.execute("SELECT 1")
        waiting = pool.submit(busy.execute, f"{SLOW} || infer('ab')")
        eventually(lambda: own.model.running == 1)
        draining = pool.submit(own.run, own.front.drain())
        eventually(lambda: own.front.relay.num_sessions == 2, what="the idle session closed")
        with pytest.raises(errors.AdminShutdown):
            idle.execute("SELECT 1")
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", own.settings.port))
        assert waiting.result(20).fetchone() == ("wolsba",)
        assert in_transaction.execute("SELECT infer('ab')").fetchone() == ("ba",)
        in_transaction.commit()
        draining.result(20)
        for connection in (busy, in_transaction):
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
    assert own.model.cancelled == 0


def test_drain_ends_what_outlasts_the_grace(cluster: EmbeddedPostgres, database: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    install(cluster.database_url(database), address_in(tmp_path))
    with front_thread(cluster, tmp_path, ReversingModel(), drain_grace_s=0.3) as own, ThreadPoolExecutor() as pool:
        busy = psycopg.connect(own.url(database), autocommit=True)
        waiting = pool.submit(busy.execute, LONG)
        eventually(lambda: own.model.running == 1)
        own.run(own.front.drain())
        with pytest.raises(psycopg.OperationalError, match="shutting down"):
            waiting.result(20)
        own.stop()
        assert own.model.running == 0


def test_too_many_calls_are_refused_with_the_limits_name(
    cluster: EmbeddedPostgres, database: str, tmp_path: Path
) -> None:
    tmp_path.chmod(0o711)
    install(cluster.database_url(database), address_in(tmp_path))
    with front_thread(cluster, tmp_path, ReversingModel(), calls_waiting_max=2) as own, ThreadPoolExecutor() as pool:
        sessions = [psycopg.connect(cluster.database_url(database), autocommit=True) for _ in range(2)]
        waiting = [pool.submit(session.execute, SLOW) for session in sessions]
        eventually(lambda: own.model.running == 2)
        with psycopg.connect(own.url(database), autocommit=True) as third:
            with pytest.raises(psycopg.Error):
                third.execute("SELECT infer('ab')")
            assert [future.result(20).fetchone() for future in waiting] == [("wols",), ("wols",)]
            for session in sessions:
                session.close()
            eventually(lambda: not own.front.listener.connections)
            assert third.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_socket_of_a_dead_node_is_taken_over(own: FrontThread, cluster: EmbeddedPostgres, database: str) -> None:
    path = own.front.address.socket_path
    assert path is not None
    own.stop()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    own.start()
    with psycopg.connect(cluster.database_url(database)) as session:
        assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)
