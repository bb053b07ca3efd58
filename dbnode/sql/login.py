"""Reads along while PostgreSQL lets a session in: its cancel key, and whether it asked for credentials. Free of I/O."""

from __future__ import annotations

from dbnode.sql.errors import PasswordlessLogin
from dbnode.sql.messages import Kind, MessageReader, message
from dbnode.sql.startup import CancelKey, parse_cancel_key

LOGIN_MESSAGE_BYTES_MAX = 256 * 1024
"""Longest message before the first ReadyForQuery; PostgreSQL's are far shorter."""
_AUTHENTICATION_OK = (0).to_bytes(4, "big")


class LoginReader:
    """Messages of the backend from the startup packet to the first ReadyForQuery.

    With `trusted` a session is let in without credentials (the embedded cluster, whose socket is private).
    """

    def __init__(self, *, trusted: bool) -> None:
        self._reader = MessageReader(LOGIN_MESSAGE_BYTES_MAX)
        self._trusted = trusted
        self._challenged = False
        self.done = False
        """ReadyForQuery has been seen; what comes now is an ordinary session."""
        self.cancel_key: CancelKey | None = None

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Bytes for the client now, and those that follow the login. Raises PasswordlessLogin, ProtocolViolation."""
        self._reader.feed(data)
        forward = []
        while not self.done and (parsed := self._reader.next_message()) is not None:
            kind, payload = parsed
            self._observe(kind, payload)
            forward.append(message(bytes((kind,)), payload))
        return b"".join(forward), self._reader.take_rest() if self.done else b""

    def _observe(self, kind: int, payload: bytes) -> None:
        if kind == Kind.AUTHENTICATION:
            if payload[:4] != _AUTHENTICATION_OK:
                self._challenged = True
            elif not self._challenged and not self._trusted:
                raise PasswordlessLogin(
                    "PostgreSQL let this session in without asking for credentials",
                    hint="In pg_hba.conf, demand scram-sha-256 of connections from the DB node.",
                )
        elif kind == Kind.BACKEND_KEY_DATA:
            self.cancel_key = parse_cancel_key(payload)
        elif kind == Kind.READY_FOR_QUERY:
            self.done = True
