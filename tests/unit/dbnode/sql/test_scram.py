"""SCRAM-SHA-256 against the example of RFC 7677 and against a client of our own."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.scram import ITERATIONS, ScramFailed, ScramServer, Verifier

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
