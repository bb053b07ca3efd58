"""TLS with clients, before a PostgreSQL on a Unix socket."""

from __future__ import annotations

import contextlib
import socket
import ssl
import warnings
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import errors
from psycopg.rows import dict_row

from dbnode.sql.messages import cstring, int32, message
from stratakv.errors import SetupError
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import TlsMode
from tests.certificates import CertificateFiles, write_certificate
from tests.integration.sql.harness import FrontThread, ReversingModel, front_thread
from tests.integration.sql.raw_client import GSS_REQUEST, TIMEOUT_S, TLS_REQUEST, RawClient, startup
from tests.support import eventually

CANCEL_CODE = (1234 << 16) | 5678


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    return write_certificate(tmp_path_factory.mktemp("tls"), "node")


@pytest.fixture(scope="module")
def face(
    cluster: EmbeddedPostgres, certificate: CertificateFiles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FrontThread]:
    """A face that gives TLS to who asks for it."""
    directory = tmp_path_factory.mktemp("listener")
    with front_thread(
        cluster, directory, ReversingModel(), tls_cert=certificate.certificate, tls_key=certificate.key
    ) as running:
        yield running


@pytest.fixture
def verified(face: FrontThread, certificate: CertificateFiles) -> str:
    """A URL whose client trusts this certificate only."""
    return face.url("postgres") + f"?sslmode=verify-full&sslrootcert={certificate.certificate}"


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _encrypted(client: RawClient, context: ssl.SSLContext | None = None) -> None:
    """Go on under TLS."""
    client.send(TLS_REQUEST)
    assert client.socket.recv(1) == b"S"
    client.socket = (context or _context()).wrap_socket(client.socket)


@pytest.mark.parametrize("negotiation", ["postgres", "direct"])
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_client_checks_the_certificate_and_works(verified: str, negotiation: str, version: str) -> None:
    rows = [(i, f"text {i}" * 200) for i in range(2000)]
    url = (
        f"{verified}&sslnegotiation={negotiation}&ssl_min_protocol_version={version}&ssl_max_protocol_version={version}"
    )
    with psycopg.connect(url, autocommit=True) as connection:
        assert connection.pgconn.ssl_in_use
        connection.execute("CREATE TEMP TABLE t (i int, body text)")
        with connection.cursor().copy("COPY t FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        with connection.cursor().copy("COPY t TO STDOUT") as copy:
            copy.set_types(["int4", "text"])
            assert list(copy.rows()) == rows
        with connection.pipeline():
            cursors = [connection.execute("SELECT %s::int", (i,)) for i in range(50)]
        assert [cursor.fetchone() for cursor in cursors] == [(i,) for i in range(50)]


def test_client_without_tls_is_served_too(face: FrontThread) -> None:
    with psycopg.connect(face.url("postgres"), sslmode="disable") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_client_that_trusts_another_certificate_refuses(face: FrontThread, tmp_path: Path) -> None:
    other = write_certificate(tmp_path, "other")
    with pytest.raises(errors.OperationalError, match="certificate verify failed"):
        psycopg.connect(face.url("postgres") + f"?sslmode=verify-full&sslrootcert={other.certificate}")


def test_handshake_may_come_byte_by_byte(face: FrontThread) -> None:
    """And the first message under TLS together with its end."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = _context().wrap_bio(incoming, outgoing)
    with RawClient(face.front.port) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.send(TLS_REQUEST)
        assert client.socket.recv(1) == b"S"
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                for byte in outgoing.read():
                    client.send(bytes((byte,)))
                incoming.write(client.socket.recv(65536))
        tls.write(startup("postgres"))
        client.send(outgoing.read())
        received = b""
        while not received.endswith(b"Z\0\0\0\5I"):
            incoming.write(client.socket.recv(65536))
            while incoming.pending:
                received += tls.read()


@pytest.mark.parametrize("injected", [startup("postgres"), b"x", GSS_REQUEST])
def test_what_came_in_plain_text_before_the_handshake_never_counts(face: FrontThread, injected: bytes) -> None:
    with RawClient(face.front.port) as client:
        client.send(TLS_REQUEST + injected)
        answer = client.read_all()
    assert b"C08P01\0" in answer
    assert b"received unencrypted data" in answer


@pytest.mark.parametrize("asked", [TLS_REQUEST, GSS_REQUEST])
def test_encryption_is_not_asked_for_under_tls(face: FrontThread, asked: bytes) -> None:
    with RawClient(face.front.port) as client:
        _encrypted(client)
        client.send(asked)
        assert b"C08P01\0" in client.read_all()


def test_gss_is_declined_before_tls(face: FrontThread) -> None:
    with RawClient(face.front.port) as client:
        client.send(GSS_REQUEST)
        assert client.socket.recv(1) == b"N"
        _encrypted(client)
        client.log_in("postgres")


def test_direct_tls_without_the_name_of_the_protocol_is_refused(face: FrontThread) -> None:
    """Else a browser could be led to talk to a database."""
    with RawClient(face.front.port) as client:
        client.socket = _context().wrap_socket(client.socket)
        client.send(startup("postgres"))
        assert client.read_all() == b""


def test_tls_before_1_2_is_refused(face: FrontThread) -> None:
    context = _context()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):  # it is deprecated
        context.minimum_version = ssl.TLSVersion.TLSv1_1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with RawClient(face.front.port) as client, pytest.raises((ssl.SSLError, OSError)):
        _encrypted(client, context)


def test_broken_handshakes_leave_nothing_behind(face: FrontThread) -> None:
    for garbage in (
        b"",
        b"\x16\x03\x01\x00\x05hello",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\xff\xff" + b"x" * 70_000,
    ):
        with RawClient(face.front.port) as client:
            client.send(TLS_REQUEST)
            assert client.socket.recv(1) == b"S"
            with contextlib.suppress(OSError):  # it may be closed before all is sent
                client.socket.sendall(garbage)
                client.socket.shutdown(socket.SHUT_WR)
            client.read_all()
    eventually(lambda: not face.front.relay.handshakes and not face.front.relay.num_sessions)


def test_damaged_record_ends_the_session(face: FrontThread) -> None:
    with RawClient(face.front.port) as client:
        plain = client.socket.dup()
        _encrypted(client)
        client.log_in("postgres")
        plain.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        plain.settimeout(TIMEOUT_S)
        while plain.recv(65536):
            pass
        plain.close()
    eventually(lambda: not face.front.relay.num_sessions)


def test_cancel_works_under_tls(face: FrontThread) -> None:
    with RawClient(face.front.port) as client:
        _encrypted(client)
        client.send(startup("postgres", protocol=(3 << 16) | 2))
        greeting = client.read_until(b"Z\0\0\0\5I")
        place = greeting.index(b"K\0\0") + 1
        length = int.from_bytes(greeting[place : place + 4], "big")
        key = greeting[place + 4 : place + length]
        client.send(message(b"Q", cstring("SELECT pg_sleep(60)")))
        client.socket.settimeout(0.2)
        eventually(lambda: _cancelled(face.front.port, key, client), what="the statement was cancelled")


def _cancelled(port: int, key: bytes, client: RawClient) -> bool:
    """It may come too early for the statement it is meant for."""
    with RawClient(port) as canceller:
        _encrypted(canceller)
        canceller.send(int32(8 + len(key)) + int32(CANCEL_CODE) + key)
        assert canceller.read_all() == b""
    try:
        return b"canceling statement due to user request" in client.read_until(b"Z\0\0\0\5I")
    except TimeoutError:
        return False


def test_without_tls_nobody_is_let_in_where_it_is_required(
    cluster: EmbeddedPostgres, certificate: CertificateFiles, tmp_path: Path
) -> None:
    with front_thread(
        cluster,
        tmp_path,
        ReversingModel(),
        tls_cert=certificate.certificate,
        tls_key=certificate.key,
        tls_mode=TlsMode.REQUIRE,
    ) as running:
        with pytest.raises(errors.OperationalError, match="lets nobody in without TLS"):
            psycopg.connect(running.url("postgres"), sslmode="disable")
        with psycopg.connect(running.url("postgres"), sslmode="prefer") as connection:
            assert connection.pgconn.ssl_in_use
            with RawClient(running.front.port) as canceller:  # libpq before 17 cancels in plain text
                canceller.send(int32(16) + int32(CANCEL_CODE) + int32(1) + b"1234")
                assert canceller.read_all() == b""


def test_tls_can_be_switched_off(cluster: EmbeddedPostgres, certificate: CertificateFiles, tmp_path: Path) -> None:
    with (
        front_thread(
            cluster,
            tmp_path,
            ReversingModel(),
            tls_cert=certificate.certificate,
            tls_key=certificate.key,
            tls_mode=TlsMode.DISABLE,
        ) as running,
        pytest.raises(errors.OperationalError, match="does not support SSL"),
    ):
        psycopg.connect(running.url("postgres"), sslmode="require")


def test_certificate_is_read_again_and_open_sessions_stay(cluster: EmbeddedPostgres, tmp_path: Path) -> None:
    used = write_certificate(tmp_path, "used")
    next_one = write_certificate(tmp_path, "next")
    directory = tmp_path / "listener"
    with front_thread(cluster, directory, ReversingModel(), tls_cert=used.certificate, tls_key=used.key) as running:
        url = running.url("postgres") + "?sslmode=verify-full&sslrootcert="
        with psycopg.connect(f"{url}{used.certificate}") as connection:
            old_root = tmp_path / "old.crt"
            old_root.write_bytes(used.certificate.read_bytes())
            used.certificate.write_bytes(b"no certificate")
            running.loop.call_soon_threadsafe(running.front.reload)  # refused, and nothing changes
            psycopg.connect(f"{url}{old_root}").close()
            used.certificate.write_bytes(next_one.certificate.read_bytes())
            used.key.write_bytes(next_one.key.read_bytes())
            running.loop.call_soon_threadsafe(running.front.reload)
            psycopg.connect(f"{url}{next_one.certificate}").close()
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_mistakes_in_the_files_are_named(
    cluster: EmbeddedPostgres, certificate: CertificateFiles, tmp_path: Path
) -> None:
    open_key = tmp_path / "open.key"
    open_key.write_bytes(certificate.key.read_bytes())
    open_key.chmod(0o644)
    other = write_certificate(tmp_path, "other")
    cases: list[tuple[dict[str, object], str]] = [
        ({"tls_cert": certificate.certificate}, "go together"),
        ({"tls_mode": TlsMode.REQUIRE}, "there is no certificate"),
        ({"tls_cert": tmp_path / "none", "tls_key": certificate.key}, "none: No such file"),
        ({"tls_cert": certificate.certificate, "tls_key": open_key}, "may be read by others"),
        ({"tls_cert": certificate.certificate, "tls_key": other.key}, "no certificate and its key"),
        ({"tls_mode": TlsMode.PASSTHROUGH}, "no TLS on a Unix socket"),
        ({"auth_file": tmp_path / "none"}, "sql.auth_file.*No such file"),
    ]
    for settings, expected in cases:
        with (
            pytest.raises(SetupError, match=expected),
            front_thread(cluster, tmp_path / "listener", ReversingModel(), **settings),
        ):
            pass


def test_newest_protocol_is_negotiated_by_libpq(verified: str) -> None:
    with psycopg.connect(verified + "&max_protocol_version=latest", autocommit=True) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        connection.cancel_safe(timeout=10)


def test_admin_database_shows_who_is_under_tls(face: FrontThread, verified: str) -> None:
    admin = verified.replace("/postgres?", f"/{face.settings.admin_database}?")
    with psycopg.connect(verified), psycopg.connect(admin, autocommit=True) as connection:
        clients = psycopg.ClientCursor(connection, row_factory=dict_row).execute("SHOW CLIENTS").fetchall()
        assert [client["tls"] for client in clients] == ["TLSv1.3"]
