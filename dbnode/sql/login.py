"""Reads along while PostgreSQL lets a session in: its cancel key, and whether it asked for credentials. Free of I/O.

What it changes is the offer of SCRAM, where the legs differ in TLS: a client without TLS cannot bind to the certificate of
the backend's, and a user with a known verifier is authenticated here.
"""

from __future__ import annotations

from dataclasses import dataclass

from dbnode.sql.errors import CertificatesDiffer, PasswordlessLogin, ProtocolViolation
from dbnode.sql.gateway_login import GatewayLogin
from dbnode.sql.messages import AuthenticationCode, Kind, MessageReader, authentication, cstring, message
from dbnode.sql.scram import MECHANISM_PLUS, Verifier
from dbnode.sql.startup import CancelKey, parse_cancel_key
from dbnode.sql.tls_transport import EndPoint

LOGIN_MESSAGE_BYTES_MAX = 256 * 1024
"""Longest message before the first ReadyForQuery, and all that a client may send ahead; PostgreSQL's are far shorter."""
_PLUS = MECHANISM_PLUS.encode()


@dataclass(frozen=True, slots=True)
class Legs:
    """Whom the client has reached under TLS, and whom we have; None where there is none."""

    client: EndPoint | None = None
    backend: EndPoint | None = None

    @property
    def show_different_certificates(self) -> bool:
        """A client that binds its login to what it sees fails at PostgreSQL."""
        return self.client is not None and self.backend is not None and self.client.digest != self.backend.digest


class Login:
    """Messages from the startup packet to the first ReadyForQuery.

    With `trusted` a session is let in without credentials (the embedded cluster, whose socket is private). With `verifier`
    the user is authenticated here, if PostgreSQL asks for SCRAM.
    """

    def __init__(self, *, trusted: bool, user: str = "", verifier: Verifier | None = None) -> None:
        self.legs = Legs()
        """To be set before PostgreSQL's first message is fed."""
        self._reader = MessageReader(LOGIN_MESSAGE_BYTES_MAX)
        self._client_reader = MessageReader(LOGIN_MESSAGE_BYTES_MAX)
        self._trusted = trusted
        self._user = user
        self._verifier = verifier
        self._challenged = False
        self._gateway: GatewayLogin | None = None
        self._held = b""
        self._may_not_bind = False
        self.done = False
        """ReadyForQuery has been seen; what comes now is an ordinary session."""
        self.cancel_key: CancelKey | None = None

    def feed(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        """Of the backend: bytes for the client, bytes for the backend, and those that follow the login.

        Raises PermissionDenied, ProtocolViolation.
        """
        self._reader.feed(data)
        for_client, for_backend = [], []
        while not self.done and (parsed := self._reader.next_message()) is not None:
            kind, payload = parsed
            if kind == Kind.AUTHENTICATION:
                client_part, backend_part = self._on_authentication(payload)
                for_client.append(client_part)
                for_backend.append(backend_part)
                continue
            if kind == Kind.BACKEND_KEY_DATA:
                self.cancel_key = parse_cancel_key(payload)
            elif kind == Kind.READY_FOR_QUERY:
                self.done = True
            for_client.append(message(bytes((kind,)), payload))
        return b"".join(for_client), b"".join(for_backend), self._reader.take_rest() if self.done else b""

    def feed_client(self, data: bytes) -> tuple[bytes, bytes]:
        """Of the client: bytes for the backend, and bytes for the client. Raises PermissionDenied, ProtocolViolation."""
        if self._gateway is None:
            if self._may_not_bind:
                self._refuse_binding(data)
            return data, b""
        if self._gateway.done:
            return data, b""
        self._client_reader.feed(data)
        for_backend = for_client = b""
        while not self._gateway.client_done and (parsed := self._client_reader.next_message()) is not None:
            backend_part, client_part = self._gateway.on_client(*parsed)
            for_backend += backend_part
            for_client += client_part
        if self._gateway.client_done:
            self._held += self._client_reader.take_rest()
            if len(self._held) > LOGIN_MESSAGE_BYTES_MAX:
                raise ProtocolViolation("too much is sent before the login has ended")
        return for_backend, for_client

    def _on_authentication(self, payload: bytes) -> tuple[bytes, bytes]:
        """Of PostgreSQL's request: for the client, and for the backend."""
        code, rest = int.from_bytes(payload[:4], "big"), payload[4:]
        as_it_is = message(b"R", payload)
        if code == AuthenticationCode.OK:
            return self._on_ok(as_it_is)
        self._challenged = True
        if code == AuthenticationCode.SASL:
            return self._on_offer(rest.split(b"\0"), as_it_is), b""
        if self._gateway is None:
            return as_it_is, b""
        if code == AuthenticationCode.SASL_CONTINUE:
            return b"", self._gateway.on_continue(rest)
        if code == AuthenticationCode.SASL_FINAL:
            return self._gateway.on_final(rest), b""
        raise ProtocolViolation("PostgreSQL asks for another authentication in the middle of SCRAM")

    def _on_ok(self, as_it_is: bytes) -> tuple[bytes, bytes]:
        if self._gateway is not None and not self._gateway.done:
            raise ProtocolViolation("PostgreSQL ended SCRAM early")
        if not self._challenged and not self._trusted:
            raise PasswordlessLogin(
                "PostgreSQL let this session in without asking for credentials",
                hint="In pg_hba.conf, demand scram-sha-256 of connections from the DB node.",
            )
        held, self._held = self._held, b""
        return as_it_is, held

    def _on_offer(self, mechanisms: list[bytes], as_it_is: bytes) -> bytes:
        if self._verifier is not None and self._gateway is None:
            self._gateway = GatewayLogin(self._user, self._verifier, self.legs.client, self.legs.backend)
            return self._gateway.offer(frozenset(mechanisms))
        if _PLUS not in mechanisms:
            return as_it_is
        if self.legs.client is None:
            # libpq takes the offer of channel binding without TLS for an attack.
            kept = b"".join(name + b"\0" for name in mechanisms if name not in (_PLUS, b""))
            return authentication(AuthenticationCode.SASL, kept + b"\0")
        self._may_not_bind = self.legs.show_different_certificates
        return as_it_is

    def _refuse_binding(self, data: bytes) -> None:
        """Say why the login is going to fail. A message in pieces is left to PostgreSQL, which says less."""
        self._may_not_bind = False
        if data[:1] == b"p" and data[5:].startswith(cstring(MECHANISM_PLUS)):
            raise CertificatesDiffer(
                "the client binds its login to the DB node's certificate, but PostgreSQL shows another one",
                hint="Name the user in sql.auth_file, give both the same certificate, set sql.tls_mode = passthrough,"
                " or connect with channel_binding=disable.",
            )
