"""infer()'s callback over TCP: under TLS, with a certificate that SCRAM vouches for."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from itertools import count

import psycopg
import pytest

from stratakv.settings import SqlSettings
from stratakv.sqlfunctions import ListenerAddress, install
from tests.debian.conftest import World
from tests.integration.sql.harness import FrontThread, ReversingModel, front_on
from tests.integration.sql.raw_client import TIMEOUT_S, TLS_REQUEST
from tests.support import free_port

pytestmark = pytest.mark.debian

PROMPT = "nobody else shall read this"
_numbers = count()


@pytest.fixture
def face(world: World) -> Iterator[FrontThread]:
    settings = SqlSettings(port=0, listener_port=free_port(), listener_key="k e'y\\1", listener_tls=True)  # type: ignore[arg-type]
    with front_on(world.server.url, settings, ReversingModel()) as running:
        yield running


@pytest.fixture
def database(world: World) -> Iterator[str]:
    """URL of an empty one."""
    name = f"listener_{next(_numbers)}"
    with psycopg.connect(world.server.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        yield world.server.url.removesuffix("postgres") + name
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _ask(database: str) -> object:
    with psycopg.connect(database) as connection:
        row = connection.execute("SELECT stratakv.infer(%s)", (PROMPT,)).fetchone()
        assert row is not None
        return row[0]


def test_prompts_travel_under_tls(face: FrontThread, database: str) -> None:
    address = ListenerAddress.from_settings(face.settings)
    with _Between(address.port, None) as between:
        install(database, ListenerAddress("127.0.0.1", between.port, address.key, tls=True))
        assert _ask(database) == PROMPT[::-1]
    assert b"TLS" not in between.seen
    assert PROMPT.encode() not in between.seen
    assert len(between.seen) > 1000


def test_who_takes_the_listeners_place_is_noticed_before_it_gets_a_prompt(
    face: FrontThread, database: str, world: World
) -> None:
    """It shows a certificate of its own and passes everything on: the login is bound to the certificate."""
    address = ListenerAddress.from_settings(face.settings)
    with _Between(address.port, world) as between:
        install(database, ListenerAddress("127.0.0.1", between.port, address.key, tls=True))
        with pytest.raises(psycopg.OperationalError, match="could not establish connection"):
            _ask(database)
    assert b"SCRAM-SHA-256-PLUS" in between.seen  # it did read the login
    assert face.model.calls == []


def test_caller_without_tls_is_told_what_to_do(face: FrontThread, database: str) -> None:
    address = ListenerAddress.from_settings(face.settings)
    install(database, ListenerAddress(address.host, address.port, address.key, tls=False))
    with pytest.raises(psycopg.OperationalError, match="demands TLS"):
        _ask(database)


def test_tls_without_binding_is_not_enough(face: FrontThread) -> None:
    """A client that lets itself be talked out of the binding could be talking to anybody."""
    url = f"postgresql://stratakv@127.0.0.1:{face.settings.listener_port}/stratakv"
    options = {"password": str(face.settings.listener_key), "sslmode": "require"}
    psycopg.connect(url, **options, channel_binding="require").close()
    with pytest.raises(psycopg.OperationalError, match=r"none of the server's SASL|expected SCRAM-SHA-256-PLUS"):
        psycopg.connect(url, **options, channel_binding="disable")


class _Between:
    """Somebody between PostgreSQL and the listener: passes bytes on, or ends TLS with a certificate of its own."""

    def __init__(self, target_port: int, world: World | None) -> None:
        self._target_port = target_port
        self._world = world
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.seen = b""
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> _Between:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._server.accept()
                self._start(self._serve, caller)

    def _serve(self, caller: socket.socket) -> None:
        with contextlib.suppress(OSError), caller, socket.create_connection(("127.0.0.1", self._target_port)) as target:
            if self._world is not None:
                caller, target = self._take_part(caller, target, self._world)
            with caller, target:
                onward = threading.Thread(target=self._pump, args=(caller, target), daemon=True)
                onward.start()
                self._pump(target, caller)
                onward.join(TIMEOUT_S)

    def _take_part(
        self, caller: socket.socket, target: socket.socket, world: World
    ) -> tuple[socket.socket, socket.socket]:
        assert caller.recv(len(TLS_REQUEST)) == TLS_REQUEST
        caller.sendall(b"S")
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(world.other.certificate, world.other.key)
        target.sendall(TLS_REQUEST)
        assert target.recv(1) == b"S"
        trusting = ssl.create_default_context()
        trusting.check_hostname = False
        trusting.verify_mode = ssl.CERT_NONE
        return own.wrap_socket(caller, server_side=True), trusting.wrap_socket(target)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.seen += data
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
