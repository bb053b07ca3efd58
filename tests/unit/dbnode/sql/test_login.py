"""The login across two legs: what is offered to whom, and what any bytes can do to it."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.errors import AuthenticationFailed, CertificatesDiffer, ProtocolViolation
from dbnode.sql.login import LOGIN_MESSAGE_BYTES_MAX, Legs, Login
from dbnode.sql.messages import AuthenticationCode, MessageReader, authentication, cstring, int32, message
from dbnode.sql.scram import ITERATIONS, MECHANISM, MECHANISM_PLUS, ScramClient, ScramServer, Verifier
from dbnode.sql.tls_transport import EndPoint
from stratakv.errors import PermissionDenied

ONE, OTHER = (EndPoint(hashlib.sha256(name).digest()) for name in (b"one", b"other"))
BOTH = authentication(AuthenticationCode.SASL, cstring(MECHANISM_PLUS) + cstring(MECHANISM) + b"\0")
PLAIN = authentication(AuthenticationCode.SASL, cstring(MECHANISM) + b"\0")
END = authentication(AuthenticationCode.OK) + message(b"K", int32(7) + b"secret-key") + message(b"Z", b"I")
VERIFIER = Verifier.of("pencil", b"salt")
KEY = hmac.digest(hashlib.pbkdf2_hmac("sha256", b"pencil", b"salt", ITERATIONS), b"Client Key", "sha256")


def _login(client: EndPoint | None, backend: EndPoint | None, verifier: Verifier | None = None) -> Login:
    login = Login(trusted=False, user="ada", verifier=verifier)
    login.legs = Legs(client, backend)
    return login


def _first(client: ScramClient) -> bytes:
    first = client.first()
    return message(b"p", cstring(client.mechanism) + int32(len(first)) + first)


@pytest.mark.parametrize(
    ("client", "backend", "offer", "expected"),
    [
        (None, None, PLAIN, PLAIN),
        (None, ONE, BOTH, PLAIN),
        (ONE, None, PLAIN, PLAIN),
        (ONE, ONE, BOTH, BOTH),
        (ONE, OTHER, BOTH, BOTH),
    ],
)
def test_binding_is_offered_where_there_is_something_to_bind_to(
    client: EndPoint | None, backend: EndPoint | None, offer: bytes, expected: bytes
) -> None:
    assert _login(client, backend).feed(offer) == (expected, b"", b"")


def test_binding_that_must_fail_is_refused_with_its_reason() -> None:
    bound = _first(ScramClient(b"k" * 32, b"s" * 32, "nonce", ONE.digest))
    free = _first(ScramClient(b"k" * 32, b"s" * 32, "nonce"))
    for backend, data, fails in ((OTHER, bound, True), (ONE, bound, False), (OTHER, free, False)):
        login = _login(ONE, backend)
        login.feed(BOTH)
        if fails:
            with pytest.raises(CertificatesDiffer):
                login.feed_client(data)
        else:
            assert login.feed_client(data) == (data, b"")


@pytest.mark.parametrize("client_end", [None, ONE])
@pytest.mark.parametrize("backend_end", [None, OTHER])
@given(cut=st.integers(0, 200))
def test_gateway_logs_in_on_both_sides_wherever_messages_are_cut(
    client_end: EndPoint | None, backend_end: EndPoint | None, cut: int
) -> None:
    """And what the client sends ahead follows the login."""
    login = _login(client_end, backend_end, VERIFIER)
    postgres = ScramServer(VERIFIER, "server", backend_end.digest if backend_end else None)
    client = ScramClient(KEY, VERIFIER.server_key, "client", client_end.digest if client_end else None)

    offered = _read(login.feed(BOTH if backend_end else PLAIN)[0])
    assert (MECHANISM_PLUS.encode() in offered.split(b"\0")) is (client_end is not None)
    for_client = b""
    for part in _cut(_first(client), cut):
        backend_part, client_part = login.feed_client(part)
        assert backend_part == b""
        for_client += client_part
    for_backend = b""
    for part in _cut(message(b"p", client.final(_read(for_client))) + message(b"Q", b"ahead\0"), cut):
        backend_part, client_part = login.feed_client(part)
        assert client_part == b""
        for_backend += backend_part
    mechanism, _, rest = _read(for_backend).partition(b"\0")
    challenge = authentication(AuthenticationCode.SASL_CONTINUE, postgres.first(rest[4:], mechanism.decode()))
    _, for_backend, _ = login.feed(challenge)
    done = authentication(AuthenticationCode.SASL_FINAL, postgres.final(_read(for_backend)))
    for_client, for_backend, rest = login.feed(done + END + b"later")
    assert for_backend == message(b"Q", b"ahead\0")
    assert rest == b"later"
    assert for_client.endswith(END)
    client.verify(_read(for_client))
    assert login.feed_client(b"more") == (b"more", b"")


def _read(data: bytes) -> bytes:
    """Payload of the first message; of an authentication without its code."""
    reader = MessageReader(LOGIN_MESSAGE_BYTES_MAX)
    reader.feed(data)
    parsed = reader.next_message()
    assert parsed is not None
    return parsed[1][4:] if parsed[0] == ord("R") else parsed[1]


def _cut(data: bytes, place: int) -> tuple[bytes, bytes]:
    return data[:place], data[place:]


def test_wrong_password_fails_before_postgresql_hears_of_it() -> None:
    login = _login(None, None, VERIFIER)
    login.feed(PLAIN)
    client = ScramClient(b"k" * 32, VERIFIER.server_key, "client")
    server_first = _read(login.feed_client(_first(client))[1])
    with pytest.raises(AuthenticationFailed, match='password authentication failed for user "ada"'):
        login.feed_client(message(b"p", client.final(server_first)))


@pytest.mark.parametrize(
    "answer",
    [
        authentication(AuthenticationCode.OK),
        authentication(AuthenticationCode.SASL_CONTINUE, b"r=nonce,s=,i=1"),
        authentication(AuthenticationCode.SASL_FINAL, b"v="),
        message(b"R", int32(3)),
    ],
)
def test_postgresql_that_leaves_scram_early_lets_nobody_in(answer: bytes) -> None:
    login = _login(None, None, VERIFIER)
    login.feed(PLAIN)
    with pytest.raises((PermissionDenied, ProtocolViolation)):
        login.feed(answer)


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=80)), max_size=6), st.booleans())
def test_any_bytes_are_passed_on_held_or_refused_and_let_nobody_in(
    parts: list[tuple[bool, bytes]], known: bool
) -> None:
    login = _login(None, None, VERIFIER if known else None)
    login.feed(PLAIN)
    told = b""
    try:
        for is_client, data in parts:
            told += login.feed_client(data)[1] if is_client else login.feed(data)[0]
    except (PermissionDenied, ProtocolViolation):
        pass
    assert not known or authentication(AuthenticationCode.OK) not in told


def test_what_is_sent_ahead_is_bounded() -> None:
    login = _login(None, None, VERIFIER)
    login.feed(PLAIN)
    client = ScramClient(KEY, VERIFIER.server_key, "client")
    server_first = _read(login.feed_client(_first(client))[1])
    login.feed_client(message(b"p", client.final(server_first)))
    login.feed_client(b"x" * LOGIN_MESSAGE_BYTES_MAX)
    with pytest.raises(ProtocolViolation, match="too much"):
        login.feed_client(b"x")
