"""The gateway's own statement on a client's backend: `SELECT stratakv.bind(nonce, listener)`. Free of I/O.

It goes out between ReadyForQuery and the client's next message, with a named statement and a named portal: the client's
unnamed ones survive. Its answers are swallowed; what PostgreSQL may send at any time is handed on.
"""

from __future__ import annotations

from dbnode.sql.messages import Kind, MessageReader, cstring, int16, int32, message

ANSWER_BYTES_MAX = 64 * 1024
"""Longest message among the answers; a NOTIFY carries up to 8,000 bytes."""
_NAME = "stratakv_gateway_bind"
_STATEMENT = "SELECT stratakv.bind($1, $2)"
_HAND_ON = (Kind.NOTIFICATION_RESPONSE, Kind.PARAMETER_STATUS)
_CLOSE = message(b"C", b"S" + cstring(_NAME)) + message(b"S")


class BindExchange:
    """One attempt. Two round trips: the second closes the statement, also after an error."""

    def __init__(self, nonce: str, listener: str) -> None:
        self._reader = MessageReader(ANSWER_BYTES_MAX)
        self._is_closing = False
        self.request = _bind_request(nonce, listener)
        """What to send first."""
        self.done = False
        self.failed = False
        self.last_error = b""
        """An ErrorResponse, for the client if the session ends by it."""

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Bytes for the client, and bytes for the backend. Raises ProtocolViolation."""
        self._reader.feed(data)
        for_client = for_backend = b""
        while not self.done and (parsed := self._reader.next_message()) is not None:
            kind, payload = parsed
            if kind == Kind.READY_FOR_QUERY and not self._is_closing:
                self._is_closing = True
                for_backend = _CLOSE
            elif kind == Kind.READY_FOR_QUERY:
                self.done = True
            elif kind == Kind.ERROR_RESPONSE:
                self.failed = True
                self.last_error = message(bytes((kind,)), payload)
            elif kind in _HAND_ON:
                for_client += message(bytes((kind,)), payload)
        return for_client, for_backend

    def take_rest(self) -> bytes:
        """What the backend sent after the exchange."""
        return self._reader.take_rest()


def _bind_request(nonce: str, listener: str) -> bytes:
    values = b"".join(int32(len(value.encode())) + value.encode() for value in (nonce, listener))
    return (
        message(b"P", cstring(_NAME) + cstring(_STATEMENT) + int16(0))
        + message(b"B", cstring(_NAME) + cstring(_NAME) + int16(0) + int16(2) + values + int16(0))
        + message(b"E", cstring(_NAME) + int32(0))
        + message(b"S")
    )
