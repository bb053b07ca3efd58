"""Who is let in, and what happens to bytes that are no PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from dbnode.sql.messages import cstring, int32, message
from stratakv.errors import SetupError
from stratakv.postgres import EmbeddedPostgres
from tests.integration.sql.harness import FrontThread, ReversingModel, front_thread
from tests.integration.sql.raw_client import GSS_REQUEST, TLS_REQUEST, RawClient, startup
from tests.support import eventually, free_port

PASSWORD = "pass wörd"
METHODS = {"scram_user": "scram-sha-256", "md5_user": "md5", "plain_user": "password"}


@pytest.fixture(scope="module")
def passwords(cluster: EmbeddedPostgres) -> Iterator[None]:
    """A role for every way of asking for a password; all others are trusted."""
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        row = admin.execute("SHOW hba_file").fetchone()
        assert row is not None
        hba_file = Path(row[0])
        before = hba_file.read_text()
        admin.execute("SET password_encryption = 'md5'")
        admin.execute(f"CREATE ROLE md5_user LOGIN PASSWORD '{PASSWORD}'")
        admin.execute("SET password_encryption = 'scram-sha-256'")
        for role in ("scram_user", "plain_user"):
            admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
        hba_file.write_text("".join(f"local all {role} {method}\n" for role, method in METHODS.items()) + before)
        admin.execute("SELECT pg_reload_conf()")
        yield
        hba_file.write_text(before)
        admin.execute("SELECT pg_reload_conf()")
        admin.execute(f"DROP ROLE {', '.join(METHODS)}")


@pytest.fixture
def strict(cluster: EmbeddedPostgres, tmp_path: Path, passwords: None) -> Iterator[FrontThread]:
    """A face that lets nobody in without credentials, and whose limits are narrow."""
    with front_thread(
        cluster, tmp_path, ReversingModel(), trusted_backend=False, clients_max=2, startup_timeout_s=1.0
    ) as running:
        yield running


@pytest.mark.parametrize("role", METHODS)
def test_every_way_of_asking_for_a_password_passes_through(strict: FrontThread, role: str) -> None:
    url = strict.url("postgres", role)
    with psycopg.connect(url, password=PASSWORD) as connection:
        assert connection.execute("SELECT session_user").fetchone() == (role,)
    with pytest.raises(errors.OperationalError, match="password authentication failed"):
        psycopg.connect(url, password="wrong")


def test_session_without_credentials_is_refused(strict: FrontThread) -> None:
    with pytest.raises(errors.OperationalError, match="without asking for credentials"):
        psycopg.connect(strict.url("postgres"))
    with RawClient(strict.front.port) as client:
        client.send(startup("postgres"))
        answer = client.read_all()
    assert b"C28000\0" in answer
    assert b"R" + int32(8) + int32(0) not in answer


def test_clients_over_the_limit_are_refused_and_come_in_later(strict: FrontThread) -> None:
    url = strict.url("postgres", "scram_user")
    with (
        psycopg.connect(url, password=PASSWORD),
        psycopg.connect(url, password=PASSWORD),
        RawClient(strict.front.port) as third,
    ):
        third.send(startup("postgres", "scram_user"))
        assert b"C53300\0" in third.read_all()
    eventually(lambda: strict.front.relay.num_sessions == 0)
    psycopg.connect(url, password=PASSWORD).close()


def test_clients_that_do_not_log_in_are_closed(strict: FrontThread) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(strict.front.port)) for _ in range(3)]
        for client, sent in zip(clients, (b"", b"\0\0\0", startup("postgres", "scram_user")), strict=True):
            client.send(sent)
        for client in clients:
            client.read_all()
        eventually(lambda: not strict.front.relay.num_sessions and not strict.front.relay.handshakes)


def test_encryption_is_declined_and_the_client_goes_on(front: FrontThread) -> None:
    with RawClient(front.front.port) as client:
        for request in (GSS_REQUEST, TLS_REQUEST):
            client.send(request)
            assert client.socket.recv(10) == b"N"
        client.log_in("postgres")
        client.send(message(b"Q", cstring("SELECT 42")))
        assert b"42" in client.read_until(b"Z\0\0\0\5I")


def test_encryption_that_is_demanded_fails_cleanly(front: FrontThread) -> None:
    with pytest.raises(errors.OperationalError, match="SSL"):
        psycopg.connect(front.url("postgres"), sslmode="require")


def test_direct_tls_is_closed_without_an_answer(front: FrontThread) -> None:
    with RawClient(front.front.port) as client:
        client.send(bytes.fromhex("160301010001"))
        assert client.read_all() == b""


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        int32(4),
        int32(-1) + b"x" * 8,
        int32(10_001) + int32(196608),
        int32(0x7FFFFFFF) + int32(196608),
        int32(12) + int32(196608) + b"abcd",
        int32(13) + int32(196608) + b"user\0",
        int32(9) + int32((1234 << 16) | 5678) + b"x",
        TLS_REQUEST + TLS_REQUEST,
    ],
)
def test_malformed_startup_is_a_protocol_error(front: FrontThread, garbage: bytes) -> None:
    with RawClient(front.front.port) as client:
        client.send(garbage)
        answer = client.read_all()
    assert b"C08P01\0" in answer


def test_malformed_message_in_a_session_is_a_protocol_error_and_harms_nobody_else(front: FrontThread, url: str) -> None:
    with psycopg.connect(url, autocommit=True) as other, RawClient(front.front.port) as client:
        client.log_in("postgres")
        client.send(b"Q" + int32(3) + b"SELECT 1\0")
        assert b"C08P01\0" in client.read_all()
        assert other.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_unknown_message_type_is_answered_by_postgresql(front: FrontThread) -> None:
    with RawClient(front.front.port) as client:
        client.log_in("postgres")
        client.send(message(b"~", b"x"))
        assert b"invalid frontend message type" in client.read_all()


def test_newer_protocol_is_negotiated_by_postgresql(front: FrontThread) -> None:
    with RawClient(front.front.port) as client:
        client.send(startup("postgres", protocol=(3 << 16) | 9, **{"_pq_.unknown": "1"}))
        assert client.read_until(b"Z\0\0\0\5I").startswith(b"v")


def test_older_protocol_is_refused(front: FrontThread) -> None:
    with RawClient(front.front.port) as client:
        client.send(int32(8) + int32(2 << 16))
        assert b"unsupported frontend protocol" in client.read_all()


def test_cancel_keys_of_the_newest_protocol_work(front: FrontThread, url: str, cluster: EmbeddedPostgres) -> None:
    with RawClient(front.front.port) as client:
        client.send(startup("postgres", protocol=(3 << 16) | 2))
        greeting = client.read_until(b"Z\0\0\0\5I")
        place = greeting.index(b"K\0\0") + 1
        length = int.from_bytes(greeting[place : place + 4], "big")
        client.send(message(b"Q", cstring("SELECT pg_sleep(60)")))
        key = greeting[place + 4 : place + length]
        eventually(lambda: _cancel(front.front.port, key) and _is_readable(client), what="the statement was cancelled")
        assert b"canceling statement due to user request" in client.read_until(b"Z\0\0\0\5I")


def _cancel(port: int, key: bytes) -> bool:
    """Whether a CancelRequest was taken; it may be too early for the statement it is meant for."""
    with RawClient(port) as canceller:
        canceller.send(int32(8 + len(key)) + int32((1234 << 16) | 5678) + key)
        return canceller.read_all() == b""


def _is_readable(client: RawClient) -> bool:
    return bool(select.select([client.socket], [], [], 0.1)[0])


def test_unreachable_backend_is_told_and_found_again(cluster: EmbeddedPostgres, tmp_path: Path) -> None:
    with front_thread(cluster, tmp_path, ReversingModel()) as running:
        socket_file = Path(cluster.socket_dir) / ".s.PGSQL.5432"
        hidden = socket_file.with_name("hidden")
        socket_file.rename(hidden)
        try:
            with pytest.raises(errors.OperationalError, match="cannot reach PostgreSQL"):
                psycopg.connect(running.url("postgres"))
        finally:
            hidden.rename(socket_file)
        psycopg.connect(running.url("postgres")).close()


def test_trusting_backend_is_not_offered_beyond_this_machine(cluster: EmbeddedPostgres, tmp_path: Path) -> None:
    with (
        pytest.raises(SetupError, match=r"sql\.host"),
        front_thread(cluster, tmp_path, ReversingModel(), host="0.0.0.0"),
    ):
        pass


def test_port_in_use_is_named(front: FrontThread, cluster: EmbeddedPostgres, tmp_path: Path) -> None:
    running = FrontThread(cluster, front.settings, ReversingModel())
    with pytest.raises(SetupError, match="another DB node already listens"):
        running.start()


def test_psql_asks_for_its_password(strict: FrontThread) -> None:
    if shutil.which("psql") is None:
        pytest.skip("no psql here")
    done = subprocess.run(
        ["psql", strict.url("postgres", "scram_user"), "-XAtc", "SELECT 1"],
        env={**os.environ, "PGPASSWORD": PASSWORD},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_face_needs_a_place_for_its_listener(cluster: EmbeddedPostgres) -> None:
    with pytest.raises(SetupError, match="nowhere to call back"), front_thread(cluster, None, ReversingModel()):
        pass


def test_listener_port_in_use_is_named(cluster: EmbeddedPostgres) -> None:
    settings = {"listener_port": free_port(), "listener_key": "k"}
    with (
        front_thread(cluster, None, ReversingModel(), **settings),
        pytest.raises(SetupError, match=r"sql\.listener_port"),
        front_thread(cluster, None, ReversingModel(), **settings),
    ):
        pass
