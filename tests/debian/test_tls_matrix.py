"""Every pairing of TLS on the client's leg, TLS on PostgreSQL's leg, and who authenticates, with two clients.

SCRAM can be bound to the certificate that the client sees; the legs may show different ones. The table says what works.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator

import asyncpg
import psycopg
import pytest

from stratakv.settings import SqlSettings, TlsMode
from tests.debian.conftest import PASSWORD, World
from tests.integration.sql.harness import FrontThread, ReversingModel, front_on

pytestmark = pytest.mark.debian

BACKENDS = ("unix", "plain", "same", "other")
"""Unix socket, TCP without TLS, TLS with the DB node's certificate, TLS with another one."""


def _front(world: World, backend: str, auth: str) -> contextlib.AbstractContextManager[FrontThread]:
    """A DB node whose certificate is the one of PostgreSQL in the case `same`."""
    shown = world.other if backend == "same" else world.own
    settings = SqlSettings(
        port=0,
        listener_port=0,
        listener_key="k",  # type: ignore[arg-type]
        tls_cert=shown.certificate,
        tls_key=shown.key,
        tls_mode=TlsMode.PASSTHROUGH if auth == "passthrough" else TlsMode.ALLOW,
        auth_file=world.auth_file if auth == "file" else None,
    )
    host = f"/?host={world.server.socket_dir}&port={world.server.port}"
    if backend != "unix":
        mode = "disable" if backend == "plain" else "verify-full"
        host = f"127.0.0.1:{world.server.port}/?sslmode={mode}&sslrootcert={world.other.certificate}"
    return front_on(f"postgresql://{host}", settings, ReversingModel())


@pytest.fixture(scope="module", params=[(backend, auth) for auth in ("relayed", "file") for backend in BACKENDS])
def place(request: pytest.FixtureRequest, world: World) -> Iterator[tuple[str, str, FrontThread]]:
    """A DB node for each backend, that relays logins or runs them."""
    backend, auth = request.param
    with _front(world, backend, auth) as front:
        yield backend, auth, front


def _expected_error(backend: str, auth: str, client_tls: bool, binding: str) -> str | None:
    """What libpq says; None: it works."""
    if binding == "require":
        if not client_tls:
            return "channel binding (is )?required"
        if auth == "relayed" and backend in ("unix", "plain"):
            return "channel binding is required, but"
    if binding != "disable" and client_tls and auth == "relayed" and backend == "other":
        return "binds its login to the DB node's certificate"
    return None


@pytest.mark.parametrize("binding", ["disable", "prefer", "require"])
@pytest.mark.parametrize("client_tls", [False, True], ids=["plain", "tls"])
def test_libpq(place: tuple[str, str, FrontThread], client_tls: bool, binding: str) -> None:
    backend, auth, front = place
    mode = "require" if client_tls else "disable"
    expected = _expected_error(backend, auth, client_tls, binding)
    conninfo = front.url("postgres") + f"?sslmode={mode}&channel_binding={binding}"
    if expected is not None:
        with pytest.raises(psycopg.OperationalError, match=expected):
            psycopg.connect(conninfo, password=PASSWORD)
        return
    with psycopg.connect(conninfo, password=PASSWORD) as connection:
        assert connection.pgconn.ssl_in_use is client_tls
        row = connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone()
        assert row == (backend in ("same", "other"),)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed for user"):
        psycopg.connect(conninfo, password="wrong")


@pytest.mark.parametrize("client_tls", [False, True], ids=["plain", "tls"])
def test_asyncpg(place: tuple[str, str, FrontThread], client_tls: bool) -> None:
    """It does not bind, so it works everywhere."""
    _, _, front = place
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE

    async def ask(password: str) -> object:
        url = front.url("postgres")
        connection = await asyncpg.connect(url, password=password, ssl=context if client_tls else False)
        try:
            return await connection.fetchval("SELECT 42")
        finally:
            await connection.close()

    assert asyncio.run(ask(PASSWORD)) == 42
    with pytest.raises(asyncpg.InvalidPasswordError):
        asyncio.run(ask("wrong"))


@pytest.mark.parametrize("backend", ["plain", "other"])
@pytest.mark.parametrize("binding", ["prefer", "require"])
def test_passthrough_shows_the_certificate_of_postgresql(world: World, backend: str, binding: str) -> None:
    with _front(world, backend, "passthrough") as front:
        tls = f"?sslmode=verify-full&sslrootcert={world.other.certificate}&channel_binding={binding}"
        with psycopg.connect(front.url("postgres") + tls, password=PASSWORD) as connection:
            assert connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone() == (True,)
            connection.execute("CREATE TEMP TABLE t (body text)")
            with connection.cursor().copy("COPY t FROM STDIN") as copy:
                for _ in range(2000):
                    copy.write_row(("x" * 1000,))
            assert connection.execute("SELECT sum(length(body)) FROM t").fetchone() == (2_000_000,)
            assert front.front.relay.num_sessions == 1
            with pytest.raises(psycopg.errors.QueryCanceled):
                _sleep_and_cancel(connection)
        with psycopg.connect(front.url("postgres") + "?sslmode=disable", password=PASSWORD) as plain:
            assert plain.execute("SELECT 1").fetchone() == (1,)


def _sleep_and_cancel(connection: psycopg.Connection) -> None:
    """Cancels go the way of their session; one that comes before its statement is without effect."""
    ended = threading.Event()

    def cancel() -> None:
        while not ended.wait(0.1):
            connection.cancel_safe(timeout=10)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    try:
        connection.execute("SELECT pg_sleep(60)")
    finally:
        ended.set()
        canceller.join()
