"""The private listener on TCP, where anybody may knock: wrong keys, nonces of others, and bytes that are no protocol."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import psutil
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnode.sql import listener_connection
from dbnode.sql.binding import SessionBinding
from dbnode.sql.messages import cstring, int32, message
from stratakv.postgres import EmbeddedPostgres
from stratakv.sqlfunctions import ListenerAddress, install
from tests.integration.sql.harness import FrontThread, ReversingModel, front_thread
from tests.integration.sql.raw_client import GSS_REQUEST, TIMEOUT_S, TLS_REQUEST, startup
from tests.support import eventually, free_port

KEY = "the key"
SECRET = "what nobody else may read"
VERSION = 160_000
MIB = 1 << 20
MODERATE = settings(max_examples=40)


class KeyHolder:
    """Somebody who knows the key, as PostgreSQL does."""

    def __init__(self, address: ListenerAddress) -> None:
        conninfo = address.conninfo(VERSION)
        self._connection = psycopg.connect(conninfo, autocommit=True, cursor_factory=psycopg.ClientCursor)

    def __enter__(self) -> KeyHolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, command: str) -> tuple[object, ...]:
        """Status, answer and SQLSTATE."""
        row = self._connection.execute(command.encode()).fetchone()
        assert row is not None
        return row[:3]

    def send(self, data: bytes) -> bytes:
        """Bytes past the library, and all that comes back."""
        with socket.socket(fileno=os.dup(self._connection.fileno())) as raw:
            return _exchange(raw, data)


def _exchange(raw: socket.socket, data: bytes) -> bytes:
    """Send it all, then listen until the other side closes, which it must."""
    raw.settimeout(TIMEOUT_S)
    received = b""
    with contextlib.suppress(ConnectionError):  # closed before it has read everything
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        while part := raw.recv(65536):
            received += part
    return received


def _call(role: str, prompt: str, pid: int = 1) -> str:
    return f"infer {pid} {role.encode().hex()} 6462 - - ={base64.b64encode(prompt.encode()).decode()}"


@pytest.fixture(scope="module")
def tcp_front(postgres: EmbeddedPostgres) -> Iterator[FrontThread]:
    options = {"listener_host": "127.0.0.1", "listener_port": free_port(), "listener_key": KEY}
    with front_thread(postgres, None, ReversingModel(), **options) as running:
        yield running


@pytest.fixture
def address(tcp_front: FrontThread) -> Iterator[ListenerAddress]:
    """Of the listener. After the test nobody is left there, and who knows the key is still served."""
    tcp_front.model.calls.clear()
    yield tcp_front.front.address
    with KeyHolder(tcp_front.front.address) as holder:
        assert holder.ask(_call("a", "ab")) == ("ok", base64.b64encode(b"ba").decode(), None)
    eventually(lambda: not tcp_front.front.listener.connections, what="the listener let go of all connections")


# Who knows the key, and who does not


def test_wrong_key_gets_nothing(address: ListenerAddress, tcp_front: FrontThread) -> None:
    for key in ("", "guess", KEY + "x", KEY.upper()):
        with pytest.raises(psycopg.OperationalError, match=r"wrong key|no password"):
            psycopg.connect(replace(address, key=key).conninfo(VERSION))
    assert tcp_front.model.calls == []


@given(
    st.lists(
        st.binary(max_size=60) | st.sampled_from([b"SCRAM-SHA-256\0", b"n,,n=,r=x", b"c=biws,r=x,p=eA=="]), max_size=3
    )
)
@MODERATE
def test_login_is_not_passed_by_any_answers(
    address: ListenerAddress, tcp_front: FrontThread, answers: list[bytes]
) -> None:
    call = message(b"Q", cstring(_call("bob", SECRET)))
    data = startup("stratakv", "stratakv") + b"".join(message(b"p", answer) for answer in answers) + call
    with socket.create_connection((address.host, address.port)) as raw:
        answer = _exchange(raw, data)
    assert b"C08P01\0" in answer or b"C28P01\0" in answer
    assert tcp_front.model.calls == []


def test_nonce_is_of_one_session_one_backend_and_one_use(address: ListenerAddress, tcp_front: FrontThread) -> None:
    async def issue(name: str, pid: int) -> str:
        return tcp_front.front.relay.registry.issue(SessionBinding(name, pid))

    nonce = tcp_front.run(issue("sql-first", 7))
    with KeyHolder(address) as first, KeyHolder(address) as again:
        assert first.ask(f"bind {nonce.encode().hex()} 7")[0] == "ok"
        assert again.ask(f"bind {nonce.encode().hex()} 7")[2] == "28000"
        # The pid of a bound session, on a connection that is not its own: nothing of that session is found or touched.
        assert again.ask(_call("bob", "x", pid=7))[0] == "ok"
        assert first.ask(_call("alice", "y", pid=7))[0] == "ok"
        elsewhere = tcp_front.run(issue("sql-second", 8))
        assert again.ask(f"bind {elsewhere.encode().hex()} 7")[2] == "28000"
        assert again.ask(f"bind {elsewhere.encode().hex()} 8")[2] == "28000"
    sessions = [(call.role, call.session.partition("-")[0]) for call in tcp_front.model.calls]
    assert sessions == [("bob", "direct"), ("alice", "sql")]


class Impostor:
    """Listens where the DB node should be, and asks for what it would like to know."""

    def __init__(self, port: int, request: bytes) -> None:
        self.heard = b""
        self._request = request
        self._server = socket.create_server(("127.0.0.1", port))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                raw, _ = self._server.accept()
                with raw:
                    raw.settimeout(TIMEOUT_S)
                    self.heard += raw.recv(65536)
                    raw.sendall(self._request)
                    while part := raw.recv(65536):
                        self.heard += part

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(TIMEOUT_S)


NO_AUTHENTICATION = message(b"R", int32(0)) + message(b"Z", b"I")
CLEAR_PASSWORD = message(b"R", int32(3))


@pytest.mark.parametrize("request_", [NO_AUTHENTICATION, CLEAR_PASSWORD], ids=["lets in", "asks for the key"])
def test_impostor_at_the_listeners_port_learns_nothing(postgres_url: str, request_: bytes) -> None:
    port = free_port()
    install(postgres_url, ListenerAddress("127.0.0.1", port, KEY))
    impostor = Impostor(port, request_)
    try:
        with psycopg.connect(postgres_url) as connection, pytest.raises(psycopg.Error, match="could not establish"):
            connection.execute("SELECT infer(%s)", (SECRET,))
        eventually(lambda: impostor.heard)
        for text in (KEY, SECRET, base64.b64encode(SECRET.encode()).decode()):
            assert text.encode() not in impostor.heard
    finally:
        impostor.close()


# Bytes that are no protocol

kinds = st.sampled_from([b"Q", b"p", b"P", b"S", b"X", b"\0", b"\xff"])
lengths = st.integers(-(2**31), 2**31 - 1)
headers = st.builds(lambda kind, length: kind + int32(length), kinds, lengths)
messages = st.builds(message, kinds, st.binary(max_size=300))
commands = st.builds(
    lambda name, words: message(b"Q", b" ".join((name, *words)) + b"\0"),
    st.sampled_from([b"infer", b"infer_within", b"bind", b"poll", b"statements", b"set client_encoding to", b"SELECT"]),
    st.lists(st.binary(max_size=12) | st.sampled_from([b"-", b"=", b"61", b"=e30=", b"1", b"99999999999"]), max_size=7),
)
garbage = st.lists(st.binary(max_size=300) | headers | messages | commands, max_size=6).map(b"".join)


@given(garbage | st.lists(st.sampled_from([TLS_REQUEST, GSS_REQUEST]), max_size=4).map(b"".join))
@MODERATE
def test_bytes_of_a_stranger_end_his_connection_and_nothing_else(address: ListenerAddress, data: bytes) -> None:
    with socket.create_connection((address.host, address.port)) as raw:
        answer = _exchange(raw, data)
    assert answer in (b"", b"N", b"NN") or b"C08P01\0" in answer or b"C28P01\0" in answer or b"C0A000\0" in answer


@given(garbage)
@MODERATE
def test_bytes_of_a_key_holder_are_answered_or_end_his_connection(address: ListenerAddress, data: bytes) -> None:
    with KeyHolder(address) as holder:
        answer = holder.send(data)
    assert answer == b"" or answer.endswith(message(b"Z", b"I")) or b"C08P01\0" in answer


def test_declared_lengths_allocate_nothing(address: ListenerAddress, tcp_front: FrontThread) -> None:
    process = psutil.Process()
    for length in (2**31 - 1, 512 * MIB):
        before = process.memory_info().rss
        with KeyHolder(address) as holder:
            assert holder.send(b"Q" + int32(length) + bytes(64 * MIB)) == b""
        assert process.memory_info().rss - before < 16 * MIB
    with socket.create_connection((address.host, address.port)) as raw:
        assert b"C08P01\0" in _exchange(raw, startup("stratakv", "stratakv") + b"p" + int32(2**31 - 1))


def test_command_that_is_too_long_is_refused_and_the_next_one_answered(address: ListenerAddress) -> None:
    with KeyHolder(address) as holder:
        assert holder.ask(_call("a", "x" * 8 * MIB))[2] == "54000"
        assert holder.ask(_call("a", "ab"))[0] == "ok"


def test_strangers_who_say_nothing_are_let_go(
    address: ListenerAddress, tcp_front: FrontThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_connection, "LOGIN_TIMEOUT_S", 2.0)
    with contextlib.ExitStack() as stack:
        for data in (b"", startup("stratakv", "stratakv"), b"\0\0\0"):
            raw = stack.enter_context(socket.create_connection((address.host, address.port)))
            raw.sendall(data)
        eventually(lambda: len(tcp_front.front.listener.connections) == 3)
        eventually(lambda: not tcp_front.front.listener.connections, what="silent strangers were let go")
