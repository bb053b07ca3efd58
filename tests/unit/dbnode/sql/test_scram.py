"""SCRAM-SHA-256 against the example of RFC 7677 and against a client of our own."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.scram import ITERATIONS, ScramClient, ScramFailed, ScramServer, Verifier

SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
SERVER_NONCE = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
CLIENT_FIRST = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
CLIENT_FINAL = (
    b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
)
VERIFIER = Verifier.of("pencil", SALT)


def _server() -> ScramServer:
    return ScramServer(VERIFIER, SERVER_NONCE)


def test_example_of_the_rfc() -> None:
    server = _server()
    assert server.first(CLIENT_FIRST) == (
        b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    )
    assert server.final(CLIENT_FINAL) == b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


@given(st.binary(max_size=120))
def test_any_first_message_is_answered_or_refused(data: bytes) -> None:
    with contextlib.suppress(ScramFailed):
        assert _server().first(data).startswith(b"r=")


@given(st.binary(max_size=120))
def test_no_other_final_message_lets_anybody_in(data: bytes) -> None:
    server = _server()
    server.first(CLIENT_FIRST)
    with pytest.raises(ScramFailed):
        server.final(data)


def test_wrong_key_fails() -> None:
    server = ScramServer(Verifier.of("pencils", SALT), SERVER_NONCE)
    server.first(CLIENT_FIRST)
    with pytest.raises(ScramFailed, match="wrong key"):
        server.final(CLIENT_FINAL)


def test_final_message_without_a_first_one_fails() -> None:
    with pytest.raises(ScramFailed):
        _server().final(CLIENT_FINAL)


@pytest.mark.parametrize("first", [b"p=tls-server-end-point,,n=,r=abc", b"n,a=other,n=,r=abc", b"n,,n=", b"n,,n=,r="])
def test_channel_binding_other_identities_and_empty_nonces_are_refused(first: bytes) -> None:
    with pytest.raises(ScramFailed):
        _server().first(first)


def test_downgrade_of_the_binding_flag_is_noticed() -> None:
    """The client's final message repeats the header it sent."""
    server = _server()
    server_first = server.first(CLIENT_FIRST.replace(b"n,,", b"y,,", 1))
    without_proof = b"c=biws," + server_first.split(b",")[0]
    salted = hashlib.pbkdf2_hmac("sha256", b"pencil", SALT, ITERATIONS)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    auth_message = CLIENT_FIRST[3:] + b"," + server_first + b"," + without_proof
    signature = hmac.digest(hashlib.sha256(client_key).digest(), auth_message, "sha256")
    proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
    with pytest.raises(ScramFailed, match="channel binding"):
        server.final(without_proof + b",p=" + base64.b64encode(proof))


DIGEST = hashlib.sha256(b"a certificate").digest()
KEY = hmac.digest(hashlib.pbkdf2_hmac("sha256", b"pencil", SALT, ITERATIONS), b"Client Key", "sha256")


def _exchange(server: ScramServer, client: ScramClient) -> None:
    server_first = server.first(client.first(), client.mechanism)
    client.verify(server.final(client.final(server_first)))


@pytest.mark.parametrize("digest", [None, DIGEST])
def test_both_sides_understand_each_other(digest: bytes | None) -> None:
    server = ScramServer(VERIFIER, SERVER_NONCE, digest)
    _exchange(server, ScramClient(KEY, VERIFIER.server_key, "client nonce", digest))
    assert server.client_key == KEY


def test_client_that_sees_another_certificate_is_noticed() -> None:
    with pytest.raises(ScramFailed, match="channel binding do not match"):
        _exchange(
            ScramServer(VERIFIER, SERVER_NONCE, DIGEST),
            ScramClient(KEY, VERIFIER.server_key, "n", hashlib.sha256(b"another").digest()),
        )


def test_client_that_was_kept_from_binding_is_noticed() -> None:
    """Its flag says that it could, had it been offered."""
    server = ScramServer(VERIFIER, SERVER_NONCE, DIGEST)
    with pytest.raises(ScramFailed, match="thinks that the server does not"):
        server.first(CLIENT_FIRST.replace(b"n,,", b"y,,", 1))
    assert _server().first(CLIENT_FIRST.replace(b"n,,", b"y,,", 1))


@pytest.mark.parametrize(
    ("mechanism", "flag"), [("SCRAM-SHA-256-PLUS", b"n"), ("SCRAM-SHA-256", b"p=tls-server-end-point"), ("PLAIN", b"n")]
)
def test_mechanism_and_flag_must_agree(mechanism: str, flag: bytes) -> None:
    with pytest.raises(ScramFailed):
        ScramServer(VERIFIER, SERVER_NONCE, DIGEST).first(CLIENT_FIRST.replace(b"n,,", flag + b",,", 1), mechanism)


def test_server_that_does_not_know_the_user_is_noticed() -> None:
    client = ScramClient(KEY, b"x" * 32, "n")
    with pytest.raises(ScramFailed, match="the server does not know"):
        _exchange(_server(), client)


@given(st.binary(max_size=120), st.binary(max_size=60))
def test_no_other_server_convinces_a_client(server_first: bytes, server_final: bytes) -> None:
    client = ScramClient(KEY, VERIFIER.server_key, "nonce")
    with pytest.raises(ScramFailed):
        client.verify(server_final)
    with contextlib.suppress(ScramFailed):
        client.final(b"r=nonce" + server_first)
    with pytest.raises(ScramFailed):
        client.verify(server_final)
