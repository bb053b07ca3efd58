"""What members of a pool know each other by: all of it is derived from one secret, `pool.secret`.

    meta server   CURVE (encrypted and authenticated): its key pair, and the one key pair that all members use as clients
    daemon        two proofs over TCP before the first byte: each end shows that it knows the secret, for this daemon's epoch
    worker        a proof with every HTTP request, over its body, which works once

Without a secret nothing is asked and every service stays on a loopback address. Bytes of KV and HTTP bodies are authenticated
only where this page says so, and not encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from stratakv.errors import SetupError
from stratakv.pool.errors import NotAMember
from stratakv.process import is_loopback
from stratakv.settings import PoolSettings

SECRET_CHARS_MIN = 16
NONCE_BYTES = 16
PROOF_BYTES = hashlib.sha256().digest_size
PROOFS_MAX = 65_536
"""Requests remembered by one challenge; then there is a new one."""
CHALLENGES_MAX = 1024
"""Workers whose challenge a client remembers."""
SCHEME = "StrataKV"


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """One end's key pair, in Z85 as ZeroMQ takes it."""

    public: bytes
    secret: bytes = field(repr=False)


class PoolCredentials:
    """What follows from a pool's secret."""

    __slots__ = ("_key",)

    def __init__(self, secret: str) -> None:
        """Raises SetupError."""
        if len(secret) < SECRET_CHARS_MIN:
            raise SetupError(
                f"pool.secret has {len(secret)} characters, {SECRET_CHARS_MIN} are the least",
                hint="take a long random one: openssl rand -hex 32",
            )
        self._key = hashlib.sha256(b"stratakv pool\0" + secret.encode()).digest()

    def __repr__(self) -> str:
        return "PoolCredentials(***)"

    @classmethod
    def from_settings(cls, settings: PoolSettings) -> PoolCredentials | None:
        """None while the pool has no secret. Raises SetupError."""
        return cls(settings.secret) if settings.secret else None

    def curve_keys(self, role: str) -> CurveKeys:
        """The key pair of the meta server (`server`), or of all its clients (`client`)."""
        secret = z85.encode(self._derive(b"curve", role.encode()))
        return CurveKeys(zmq.curve_public(secret), secret)

    def proof(self, purpose: str, *parts: bytes) -> bytes:
        """Shows that its maker knows the secret; for nothing but this purpose and these parts."""
        return self._derive(purpose.encode(), *parts)

    def check(self, proof: bytes, purpose: str, *parts: bytes) -> None:
        """Raises NotAMember."""
        if not hmac.compare_digest(proof, self.proof(purpose, *parts)):
            raise NotAMember("the other end does not know this pool's secret", hint="Give both the same pool.secret.")

    def _derive(self, *parts: bytes) -> bytes:
        framed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hmac.digest(self._key, framed, "sha256")


def require_credentials(host: str, setting: str, credentials: PoolCredentials | None) -> None:
    """Raises SetupError for a listener beyond this machine that would let anybody in."""
    if credentials is None and not is_loopback(host):
        raise SetupError(
            f"{setting} = {host}: will not listen beyond this machine without a secret",
            hint="Give all services of the pool the same pool.secret.",
        )


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """Headers of one request, and the challenge they are for."""

    headers: Mapping[str, str] = field(repr=False)
    challenge: bytes


class RequestSigner:
    """A client's side of requests to workers. Used from one event loop."""

    def __init__(self, credentials: PoolCredentials) -> None:
        self._credentials = credentials
        self._challenges: OrderedDict[str, bytes] = OrderedDict()

    def sign(self, url: str, method: str, path: str, body: bytes) -> SignedRequest:
        """For one request; the worker at `url` refuses it if its challenge is not known yet, or is over."""
        challenge = self._challenges.get(url, b"")
        nonce = os.urandom(NONCE_BYTES)
        proof = self._credentials.proof("request", challenge, nonce, *_request_parts(method, path, body))
        return SignedRequest({"Authorization": f"{SCHEME} {nonce.hex()}{proof.hex()}"}, challenge)

    def learn(self, url: str, signed: SignedRequest, challenge_header: str | None) -> bool:
        """Take the challenge of a refusal (`WWW-Authenticate`); whether it is worth signing again."""
        scheme, _, challenge_hex = (challenge_header or "").partition(" ")
        try:
            challenge = bytes.fromhex(challenge_hex)
        except ValueError:
            return False
        if scheme != SCHEME or len(challenge) != NONCE_BYTES or challenge == signed.challenge:
            return False
        self._challenges[url] = challenge
        self._challenges.move_to_end(url)
        if len(self._challenges) > CHALLENGES_MAX:
            self._challenges.popitem(last=False)
        return True


class RequestChecker:
    """A worker's side: each proof is for one challenge and works once."""

    def __init__(self, credentials: PoolCredentials) -> None:
        self._credentials = credentials
        self._challenge = os.urandom(NONCE_BYTES)
        self._seen: set[bytes] = set()

    @property
    def challenge_header(self) -> str:
        """For `WWW-Authenticate`."""
        return f"{SCHEME} {self._challenge.hex()}"

    def check(self, authorization: str | None, method: str, path: str, body: bytes) -> None:
        """Raises NotAMember."""
        scheme, _, word = (authorization or "").partition(" ")
        try:
            raw = bytes.fromhex(word)
        except ValueError:
            raw = b""
        if scheme != SCHEME or len(raw) != NONCE_BYTES + PROOF_BYTES:
            raise NotAMember("this worker answers members of its pool only", hint="Give both the same pool.secret.")
        nonce, proof = raw[:NONCE_BYTES], raw[NONCE_BYTES:]
        self._credentials.check(proof, "request", self._challenge, nonce, *_request_parts(method, path, body))
        if nonce in self._seen:
            raise NotAMember("this request was made before")
        if len(self._seen) >= PROOFS_MAX:
            self._challenge, self._seen = os.urandom(NONCE_BYTES), set()
        else:
            self._seen.add(nonce)


def _request_parts(method: str, path: str, body: bytes) -> tuple[bytes, bytes, bytes]:
    return method.encode(), path.encode(), hashlib.sha256(body).digest()
