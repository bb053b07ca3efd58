"""Login at the private listener: startup packets, TLS if that is offered, SCRAM. Bytes in, bytes out; free of I/O.

One for each `ListenerConnection`, which sends what it is handed, and runs TLS.
"""

from __future__ import annotations

import enum
import secrets

from dbnode.sql.commands import cluster_of
from dbnode.sql.errors import ProtocolViolation, TlsRequired
from dbnode.sql.messages import (
    AuthenticationCode,
    Kind,
    MessageReader,
    authentication,
    cstring,
    parameter_status,
    ready_for_query,
)
from dbnode.sql.scram import MECHANISM, MECHANISM_PLUS, ScramFailed, ScramServer, Verifier
from dbnode.sql.server_tls import ServerTls
from dbnode.sql.startup import TLS_DECLINED, TLS_GIVEN, StartupKind, StartupReader

_MESSAGE_BYTES_MAX = 4096
_NONCE_BYTES = 18
_SERVER_VERSION = "15.0"


class _Phase(enum.Enum):
    STARTUP = enum.auto()
    SCRAM_FIRST = enum.auto()
    SCRAM_FINAL = enum.auto()
    DONE = enum.auto()
    LEFT = enum.auto()


class ListenerLogin:
    """From the first byte until the other side has shown that it knows the key."""

    def __init__(self, verifier: Verifier, tls: ServerTls | None) -> None:
        self._is_tls_offered = tls is not None
        self._mechanism = MECHANISM if tls is None else MECHANISM_PLUS
        self._scram = ScramServer(
            verifier, secrets.token_urlsafe(_NONCE_BYTES), None if tls is None else tls.end_point.digest
        )
        self._phase = _Phase.STARTUP
        self._startup = StartupReader()
        self._declined: set[StartupKind] = set()
        self._messages = MessageReader(_MESSAGE_BYTES_MAX)
        self.is_tls_due = False
        """TLS was asked for and granted: what comes next is its handshake."""
        self._is_encrypted = False
        self.cluster = ""
        """Of PostgreSQL that calls; empty if its functions do not tell."""

    @property
    def is_done(self) -> bool:
        return self._phase is _Phase.DONE

    @property
    def has_left(self) -> bool:
        """The other side has said goodbye."""
        return self._phase is _Phase.LEFT

    def encrypted(self) -> None:
        """The TLS handshake has ended."""
        self.is_tls_due, self._is_encrypted = False, True

    def feed(self, data: bytes) -> bytes:
        """What to answer. Raises ProtocolViolation, PermissionDenied."""
        answer = b""
        if self._phase is _Phase.STARTUP:
            self._startup.feed(data)
            answer += self._read_startup()
        else:
            self._messages.feed(data)
        while self._phase in (_Phase.SCRAM_FIRST, _Phase.SCRAM_FINAL):
            parsed = self._messages.next_message()
            if parsed is None:
                break
            answer += self._on_message(*parsed)
        return answer

    def _read_startup(self) -> bytes:
        answer = b""
        while self._phase is _Phase.STARTUP and (packet := self._startup.next_packet()) is not None:
            if packet.kind is StartupKind.SESSION:
                self.cluster = cluster_of(packet.parameters.get("application_name", ""))
                answer += self._ask_for_key()
            elif packet.kind is StartupKind.CANCEL:
                raise ProtocolViolation("nothing can be cancelled here")
            elif packet.kind is StartupKind.TLS and self._is_tls_offered:
                if self._startup.take_rest() or self._is_encrypted:
                    raise ProtocolViolation("received unencrypted data after a request for TLS")
                self.is_tls_due = True
                answer += TLS_GIVEN
            elif packet.kind in self._declined:
                raise ProtocolViolation("encryption was declined already")
            else:
                self._declined.add(packet.kind)
                answer += TLS_DECLINED
        return answer

    def _ask_for_key(self) -> bytes:
        if self._is_tls_offered and not self._is_encrypted:
            raise TlsRequired(
                "the DB node's listener demands TLS, which this database does not know of",
                hint="Run `stratakv install` again, with the settings of the DB node.",
            )
        self._phase = _Phase.SCRAM_FIRST
        self._messages.feed(self._startup.take_rest())
        return authentication(AuthenticationCode.SASL, cstring(self._mechanism) + b"\0")

    def _on_message(self, kind: int, payload: bytes) -> bytes:
        if kind == Kind.TERMINATE:
            self._phase = _Phase.LEFT
            return b""
        if kind != Kind.PASSWORD:
            raise ProtocolViolation("expected an answer to the authentication request")
        if self._phase is _Phase.SCRAM_FIRST:
            mechanism, _, rest = payload.partition(b"\0")
            if mechanism != self._mechanism.encode():
                raise ScramFailed(f"expected {self._mechanism}")
            self._phase = _Phase.SCRAM_FINAL
            return authentication(AuthenticationCode.SASL_CONTINUE, self._scram.first(rest[4:], self._mechanism))
        server_final = self._scram.final(payload)
        self._phase = _Phase.DONE
        return (
            authentication(AuthenticationCode.SASL_FINAL, server_final)
            + authentication(AuthenticationCode.OK)
            + parameter_status("server_version", _SERVER_VERSION)
            + parameter_status("server_encoding", "UTF8")
            + parameter_status("client_encoding", "UTF8")
            + parameter_status("standard_conforming_strings", "on")
            + ready_for_query()
        )
