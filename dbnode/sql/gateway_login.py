"""A login that the DB node runs itself: SCRAM as server with the client, then as client with PostgreSQL. Free of I/O.

For users whose verifiers are known (`sql.auth_file`). Each exchange is bound to the certificate of its own leg, so it does not
matter that the legs show different ones. Used by `Login`, from PostgreSQL's request for SCRAM to its last word on it.
"""

from __future__ import annotations

import secrets

from dbnode.sql.errors import AuthenticationFailed, ProtocolViolation
from dbnode.sql.messages import AuthenticationCode, Kind, authentication, cstring, int32, message
from dbnode.sql.scram import MECHANISM_PLUS, ScramClient, ScramFailed, ScramServer, Verifier, WrongKey
from dbnode.sql.tls_transport import EndPoint

_NONCE_BYTES = 18


class GatewayLogin:
    """One login. All methods raise PermissionDenied or ProtocolViolation."""

    def __init__(self, user: str, verifier: Verifier, client: EndPoint | None, backend: EndPoint | None) -> None:
        self._user = user
        self._verifier = verifier
        self._backend = backend
        digest = client.digest if client is not None else None
        self._server = ScramServer(verifier, secrets.token_urlsafe(_NONCE_BYTES), digest)
        self._client: ScramClient | None = None
        self._offered: frozenset[bytes] = frozenset()
        self._is_begun = False
        self._server_final = b""
        self.client_done = False
        """The client has proved who it is."""
        self.done = False
        """PostgreSQL has taken our word, and proved that it knows the user too."""

    def offer(self, mechanisms: frozenset[bytes]) -> bytes:
        """For the client, in place of PostgreSQL's offer."""
        self._offered = mechanisms
        names = b"".join(cstring(name) for name in self._server.mechanisms)
        return authentication(AuthenticationCode.SASL, names + b"\0")

    def on_client(self, kind: int, payload: bytes) -> tuple[bytes, bytes]:
        """Of the client's next message: for the backend, and for the client."""
        if kind != Kind.PASSWORD:
            raise ProtocolViolation("expected an answer to the authentication request")
        try:
            if not self._is_begun:
                self._is_begun = True
                mechanism, _, rest = payload.partition(b"\0")
                server_first = self._server.first(rest[4:], mechanism.decode(errors="replace"))
                return b"", authentication(AuthenticationCode.SASL_CONTINUE, server_first)
            self._server_final = self._server.final(payload)
        except WrongKey as error:
            raise AuthenticationFailed(f'password authentication failed for user "{self._user}"') from error
        self.client_done = True
        return self._greet_backend(), b""

    def _greet_backend(self) -> bytes:
        digest = self._backend.digest if self._backend is not None else None
        if MECHANISM_PLUS.encode() not in self._offered:
            digest = None
        nonce = secrets.token_urlsafe(_NONCE_BYTES)
        self._client = ScramClient(self._server.client_key, self._verifier.server_key, nonce, digest)
        first = self._client.first()
        return message(b"p", cstring(self._client.mechanism) + int32(len(first)) + first)

    def on_continue(self, server_first: bytes) -> bytes:
        """For the backend."""
        return message(b"p", self._expect_client().final(server_first))

    def on_final(self, server_final: bytes) -> bytes:
        """For the client."""
        self._expect_client().verify(server_final)
        self.done = True
        return authentication(AuthenticationCode.SASL_FINAL, self._server_final)

    def _expect_client(self) -> ScramClient:
        if self._client is None:
            raise ScramFailed("PostgreSQL went on with an exchange that had not begun")
        return self._client
