"""The server's side of SCRAM-SHA-256 (RFC 5802, RFC 7677), without channel binding. Free of I/O.

The private listener uses it, so that the key never travels and dblink counts as having been asked for a password.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass, field

from stratakv.errors import PermissionDenied

MECHANISM = "SCRAM-SHA-256"
ITERATIONS = 4096
_CLIENT_NONCE_BYTES_MAX = 256


class ScramFailed(PermissionDenied):
    """The other side does not know the key, or does not speak SCRAM."""

    sqlstate = "28P01"


@dataclass(frozen=True, slots=True)
class Verifier:
    """What the server keeps of a password."""

    salt: bytes
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def of(cls, password: str, salt: bytes) -> Verifier:
        """`password` is ASCII: no SASLprep is done."""
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ITERATIONS)
        client_key = _hmac(salted, b"Client Key")
        return cls(salt, hashlib.sha256(client_key).digest(), _hmac(salted, b"Server Key"))


class ScramServer:
    """One exchange: `first`, then `final`."""

    def __init__(self, verifier: Verifier, nonce: str) -> None:
        self._verifier = verifier
        self._nonce = nonce
        self._gs2_header = b""
        self._auth_message = b""

    def first(self, client_first: bytes) -> bytes:
        """Server-first-message. Raises ScramFailed."""
        parts = client_first.split(b",", 2)
        if len(parts) != 3 or parts[0] not in (b"n", b"y") or parts[1]:
            raise ScramFailed("malformed SCRAM message: expected no channel binding and no authorization identity")
        bare = parts[2]
        client_nonce = _attributes(bare).get("r", "")
        if not 0 < len(client_nonce) <= _CLIENT_NONCE_BYTES_MAX:
            raise ScramFailed("malformed SCRAM message: no nonce")
        self._gs2_header = b",".join((*parts[:2], b""))
        self._nonce = client_nonce + self._nonce
        salt = base64.b64encode(self._verifier.salt).decode()
        server_first = f"r={self._nonce},s={salt},i={ITERATIONS}".encode()
        self._auth_message = bare + b"," + server_first
        return server_first

    def final(self, client_final: bytes) -> bytes:
        """Server-final-message. Raises ScramFailed."""
        without_proof, _, proof_text = client_final.rpartition(b",p=")
        attributes = _attributes(without_proof)
        if attributes.get("r") != self._nonce or attributes.get("c") != base64.b64encode(self._gs2_header).decode():
            raise ScramFailed("malformed SCRAM message: nonce or channel binding do not match")
        try:
            proof = base64.b64decode(proof_text, validate=True)
        except binascii.Error:
            raise ScramFailed("malformed SCRAM message: no proof") from None
        auth_message = self._auth_message + b"," + without_proof
        signature = _hmac(self._verifier.stored_key, auth_message)
        if len(proof) != len(signature):
            raise ScramFailed("wrong key")
        client_key = bytes(a ^ b for a, b in zip(proof, signature, strict=True))
        if not hmac.compare_digest(hashlib.sha256(client_key).digest(), self._verifier.stored_key):
            raise ScramFailed("wrong key")
        return b"v=" + base64.b64encode(_hmac(self._verifier.server_key, auth_message))


def _attributes(text: bytes) -> dict[str, str]:
    """`n=,r=abc` → {"n": "", "r": "abc"}."""
    pairs = (item.partition("=") for item in text.decode("ascii", errors="replace").split(","))
    return {name: value for name, _, value in pairs}


def _hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")
