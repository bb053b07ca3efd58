"""SCRAM-SHA-256 (RFC 5802, RFC 7677), with channel binding to the server's certificate (RFC 5929). Free of I/O.

The private listener is a server of it, so that the key never travels and dblink counts as having been asked for a password.
The relay is server and client of it for users whose verifiers it knows: who proves to a server that they know the password
thereby shows it the key that another server takes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass, field

from stratakv.errors import PermissionDenied

MECHANISM = "SCRAM-SHA-256"
MECHANISM_PLUS = "SCRAM-SHA-256-PLUS"
ITERATIONS = 4096
_BINDING_TYPE = b"p=tls-server-end-point"
_CLIENT_NONCE_BYTES_MAX = 256
_DIGEST_BYTES = 32
_STORED = re.compile(r"SCRAM-SHA-256\$(\d{1,9}):([^$:]+)\$([^$:]+):([^$:]+)")


class ScramFailed(PermissionDenied):
    """The other side does not know the key, or does not speak SCRAM."""

    sqlstate = "28P01"


class WrongKey(ScramFailed):
    """The other side speaks SCRAM, but does not know the key."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """What the server keeps of a password."""

    salt: bytes
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)
    iterations: int = ITERATIONS

    @classmethod
    def of(cls, password: str, salt: bytes) -> Verifier:
        """`password` is ASCII: no SASLprep is done."""
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ITERATIONS)
        client_key = _hmac(salted, b"Client Key")
        return cls(salt, hashlib.sha256(client_key).digest(), _hmac(salted, b"Server Key"))

    @classmethod
    def from_text(cls, text: str) -> Verifier:
        """As PostgreSQL stores it: `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`. Raises ValueError."""
        found = _STORED.fullmatch(text)
        if found is None:
            raise ValueError("expected SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey")
        salt, stored_key, server_key = (base64.b64decode(part, validate=True) for part in found.groups()[1:])
        if len(stored_key) != _DIGEST_BYTES or len(server_key) != _DIGEST_BYTES:
            raise ValueError("the keys are not of SHA-256")
        return cls(salt, stored_key, server_key, int(found[1]))


class ScramServer:
    """One exchange: `first`, then `final`. `digest` is what our certificate is bound by; None if there is none."""

    def __init__(self, verifier: Verifier, nonce: str, digest: bytes | None = None) -> None:
        self._verifier = verifier
        self._nonce = nonce
        self._digest = digest
        self._binding = b""
        self._auth_message = b""
        self.client_key = b""
        """What the client proved to know, once `final` has returned."""

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """What to offer."""
        return (MECHANISM,) if self._digest is None else (MECHANISM_PLUS, MECHANISM)

    def first(self, client_first: bytes, mechanism: str = MECHANISM) -> bytes:
        """Server-first-message. Raises ScramFailed."""
        if mechanism not in self.mechanisms:
            raise ScramFailed(f"expected {' or '.join(self.mechanisms)}")
        parts = client_first.split(b",", 2)
        if len(parts) != 3 or parts[1]:
            raise ScramFailed("malformed SCRAM message: expected a header without authorization identity")
        self._binding = b",".join((*parts[:2], b"")) + self._check_flag(parts[0], mechanism)
        bare = parts[2]
        client_nonce = _attributes(bare).get("r", "")
        if not 0 < len(client_nonce) <= _CLIENT_NONCE_BYTES_MAX:
            raise ScramFailed("malformed SCRAM message: no nonce")
        self._nonce = client_nonce + self._nonce
        salt = base64.b64encode(self._verifier.salt).decode()
        server_first = f"r={self._nonce},s={salt},i={self._verifier.iterations}".encode()
        self._auth_message = bare + b"," + server_first
        return server_first

    def _check_flag(self, flag: bytes, mechanism: str) -> bytes:
        """What follows the header in the client's proof of binding."""
        if mechanism == MECHANISM_PLUS:
            if flag != _BINDING_TYPE:
                raise ScramFailed("malformed SCRAM message: expected channel binding of type tls-server-end-point")
            return self._digest or b""
        if flag == b"y" and self._digest is not None:
            # Somebody between us took the mechanism with channel binding out of the offer.
            raise ScramFailed("the client supports channel binding but thinks that the server does not")
        if flag not in (b"n", b"y"):
            raise ScramFailed("malformed SCRAM message: expected no channel binding")
        return b""

    def final(self, client_final: bytes) -> bytes:
        """Server-final-message. Raises ScramFailed."""
        without_proof, _, proof_text = client_final.rpartition(b",p=")
        attributes = _attributes(without_proof)
        if attributes.get("r") != self._nonce or attributes.get("c") != base64.b64encode(self._binding).decode():
            raise ScramFailed("malformed SCRAM message: nonce or channel binding do not match")
        try:
            proof = base64.b64decode(proof_text, validate=True)
        except binascii.Error:
            raise ScramFailed("malformed SCRAM message: no proof") from None
        auth_message = self._auth_message + b"," + without_proof
        signature = _hmac(self._verifier.stored_key, auth_message)
        if len(proof) != len(signature):
            raise WrongKey("wrong key")
        client_key = _xor(proof, signature)
        if not hmac.compare_digest(hashlib.sha256(client_key).digest(), self._verifier.stored_key):
            raise WrongKey("wrong key")
        self.client_key = client_key
        return b"v=" + base64.b64encode(_hmac(self._verifier.server_key, auth_message))


class ScramClient:
    """One exchange with a server, by the client's key instead of a password: `first`, `final`, `verify`.

    `digest` is that of the server's certificate if the exchange shall be bound to it.
    """

    def __init__(self, client_key: bytes, server_key: bytes, nonce: str, digest: bytes | None = None) -> None:
        self._client_key = client_key
        self._server_key = server_key
        self._nonce = nonce
        self._header = b"n,," if digest is None else _BINDING_TYPE + b",,"
        self._binding = base64.b64encode(self._header + (digest or b""))
        self._auth_message = b""
        self.mechanism = MECHANISM if digest is None else MECHANISM_PLUS

    def first(self) -> bytes:
        """Client-first-message; the user's name is PostgreSQL's to know."""
        return self._header + self._bare

    @property
    def _bare(self) -> bytes:
        return f"n=,r={self._nonce}".encode()

    def final(self, server_first: bytes) -> bytes:
        """Client-final-message. Raises ScramFailed."""
        nonce = _attributes(server_first).get("r", "")
        if not nonce.startswith(self._nonce) or len(nonce) == len(self._nonce):
            raise ScramFailed("malformed SCRAM message: the server's nonce does not match")
        without_proof = b"c=" + self._binding + b",r=" + nonce.encode()
        self._auth_message = b",".join((self._bare, server_first, without_proof))
        signature = _hmac(hashlib.sha256(self._client_key).digest(), self._auth_message)
        return without_proof + b",p=" + base64.b64encode(_xor(self._client_key, signature))

    def verify(self, server_final: bytes) -> None:
        """Whether the server knows the user too. Raises ScramFailed."""
        expected = b"v=" + base64.b64encode(_hmac(self._server_key, self._auth_message))
        if not self._auth_message or not hmac.compare_digest(server_final, expected):
            raise ScramFailed("the server does not know the key")


def _attributes(text: bytes) -> dict[str, str]:
    """`n=,r=abc` → {"n": "", "r": "abc"}."""
    pairs = (item.partition("=") for item in text.decode("ascii", errors="replace").split(","))
    return {name: value for name, _, value in pairs}


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")
