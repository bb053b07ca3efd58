"""Time and room: idle sessions, peers that do not read, bytes of any kind."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnode.sql.messages import cstring, int32, message
from stratakv.postgres import EmbeddedPostgres
from tests.certificates import write_certificate
from tests.integration.sql.harness import FrontThread, ReversingModel, front_thread
from tests.integration.sql.raw_client import GSS_REQUEST, TLS_REQUEST, RawClient, startup
from tests.support import eventually

IDLE_S = 0.4
KEPT_BYTES_MAX = 32 * 1024 * 1024
"""What the gateway and the kernel's socket buffers may hold together."""
ROW = b"x" * 1000
NUM_ROWS = 80_000


@pytest.fixture(scope="module")
def face(cluster: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontThread]:
    """It gives TLS."""
    home = tmp_path_factory.mktemp("tls")
    files = write_certificate(home, "node")
    with front_thread(
        cluster, home / "listener", ReversingModel(), tls_cert=files.certificate, tls_key=files.key
    ) as running:
        yield running


def test_idle_sessions_are_ended_and_no_others(cluster: EmbeddedPostgres, tmp_path: Path) -> None:
    with front_thread(cluster, tmp_path, ReversingModel(), client_idle_timeout_s=IDLE_S) as running:
        url = running.url("postgres")
        with RawClient(running.front.port) as idle, psycopg.connect(url) as in_transaction:
            in_transaction.execute("SELECT 1")
            idle.log_in("postgres")
            assert b"C57P05\0" in idle.read_all()
            assert in_transaction.execute("SELECT 1").fetchone() == (1,)
        with psycopg.connect(url, autocommit=True) as busy:
            busy.execute("SELECT pg_sleep(%s)", (4 * IDLE_S,))
            assert busy.execute("SELECT 1").fetchone() == (1,)


def test_peers_that_vanish_are_noticed_by_the_kernel(face: FrontThread) -> None:
    with RawClient(face.front.port) as client:
        client.log_in("postgres")
        shown = Path("/proc/net/tcp").read_text()
        here, there = (f"0100007F:{port:04X}" for port in (face.front.port, client.socket.getsockname()[1]))
        line = next(line for line in shown.splitlines() if line.split()[1:3] == [here, there])
    timer, _, left = line.split()[5].partition(":")
    assert timer == "02"  # keepalive
    assert 0 < int(left, 16) <= 61 * 100


def _log_in(face: FrontThread, client: RawClient, encrypted: bool) -> None:
    if encrypted:
        client.send(TLS_REQUEST)
        assert client.socket.recv(1) == b"S"
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        client.socket = context.wrap_socket(client.socket)
    client.log_in("postgres")


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_client_that_does_not_read_stops_postgresql(
    face: FrontThread, cluster: EmbeddedPostgres, encrypted: bool
) -> None:
    copy = f"COPY (SELECT repeat('x', {len(ROW)}) FROM generate_series(1, {NUM_ROWS})) TO STDOUT"
    progress: list[int] = []
    with RawClient(face.front.port) as client, psycopg.connect(cluster.url, autocommit=True) as watch:
        _log_in(face, client, encrypted)
        client.send(message(b"Q", cstring(copy)))

        def stands_still() -> bool:
            row = watch.execute("SELECT bytes_processed FROM pg_stat_progress_copy").fetchone()
            progress.append(row[0] if row else 0)
            return progress[-1] > 0 and len(progress) > 10 and len(set(progress[-10:])) == 1

        eventually(stands_still, what="COPY stands still")
        assert progress[-1] < KEPT_BYTES_MAX
        assert _num_bytes_until(client, b"Z\0\0\0\5I") > NUM_ROWS * len(ROW)


def _num_bytes_until(client: RawClient, ending: bytes) -> int:
    num_bytes, last = 0, b""
    while not last.endswith(ending):
        data = client.socket.recv(1 << 20)
        assert data
        num_bytes += len(data)
        last = (last + data)[-len(ending) :]
    return num_bytes


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_postgresql_that_does_not_read_stops_the_client(
    face: FrontThread, cluster: EmbeddedPostgres, encrypted: bool
) -> None:
    rows = message(b"d", (ROW + b"\n") * 60)
    with psycopg.connect(cluster.database_url("postgres")) as admin, RawClient(face.front.port) as client:
        admin.execute("CREATE TABLE stalled (body text)")
        admin.commit()
        try:
            admin.execute("LOCK TABLE stalled")
            _log_in(face, client, encrypted)
            client.send(message(b"Q", cstring("COPY stalled FROM STDIN")))
            client.socket.settimeout(1.0)
            num_sent = 0
            with contextlib.suppress(TimeoutError):
                while num_sent * len(rows) < 2 * KEPT_BYTES_MAX:
                    client.send(rows)
                    num_sent += 1
            assert num_sent * len(rows) < KEPT_BYTES_MAX
        finally:
            admin.rollback()
            client.socket.close()
            admin.execute("DROP TABLE stalled")
            admin.commit()


packets = st.one_of(
    st.binary(max_size=64),
    st.sampled_from(
        [TLS_REQUEST, GSS_REQUEST, startup("postgres"), startup("postgres")[:-3], b"\x16\x03\x01\x02\x00\x01"]
    ),
    st.builds(lambda length, rest: int32(length) + rest, st.integers(-(2**31), 2**31 - 1), st.binary(max_size=40)),
)
messages = st.one_of(
    st.binary(max_size=64),
    st.builds(
        lambda kind, length, rest: bytes((kind,)) + int32(length) + rest,
        st.sampled_from(b"QPBDESCdcfFHX~p\0"),
        st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(0, 40)),
        st.binary(max_size=40),
    ),
    st.builds(
        lambda kind, rest: message(bytes((kind,)), rest), st.sampled_from(b"QPBDESCdcfFH"), st.binary(max_size=40)
    ),
)


def _say(client: RawClient, parts: list[bytes]) -> None:
    """And nothing more; the other side may have closed already."""
    with contextlib.suppress(OSError):
        for part in parts:
            client.send(part)
        client.socket.shutdown(socket.SHUT_WR)


@settings(max_examples=60)
@given(parts=st.lists(packets, max_size=4))
def test_any_startup_comes_to_an_end(face: FrontThread, parts: list[bytes]) -> None:
    with RawClient(face.front.port) as client:
        _say(client, parts)
        client.read_all()
    eventually(lambda: not face.front.relay.handshakes and not face.front.relay.num_sessions)


@settings(max_examples=60)
@given(parts=st.lists(messages, max_size=4))
def test_any_messages_of_a_session_come_to_an_end(face: FrontThread, parts: list[bytes]) -> None:
    with RawClient(face.front.port) as client:
        client.log_in("postgres")
        _say(client, parts)
        client.read_all()
    eventually(lambda: not face.front.relay.num_sessions)


def test_declared_lengths_reserve_nothing_and_are_told_wrong(face: FrontThread) -> None:
    with RawClient(face.front.port) as client:
        client.log_in("postgres")
        client.send(b"Q" + int32(2**31 - 1))
        assert b"C08P01\0" in client.read_all()
