"""The gateway's own statement on a client's backend: `SELECT stratakv.bind(nonce, listener)`. Free of I/O.

First it asks whether that function is ours: another one would run as the client's role. All of it goes out between
ReadyForQuery and the client's next message, with a named statement and a named portal: the client's unnamed ones survive.
The answers are swallowed; what PostgreSQL may send at any time is handed on.
"""

from __future__ import annotations

from dbnode.sql.messages import Kind, MessageReader, cstring, int16, int32, message
from dbnode.sql.own_exchange import text_columns
from dbnode.sql.trust import BIND_IS_OURS

ANSWER_BYTES_MAX = 64 * 1024
"""Longest message among the answers; a NOTIFY carries up to 8,000 bytes."""
_NAME = "stratakv_gateway_bind"
_STATEMENT = b"SELECT stratakv.bind($1, $2)"
_HAND_ON = (Kind.NOTIFICATION_RESPONSE, Kind.PARAMETER_STATUS)
_CLOSE = message(b"C", b"S" + cstring(_NAME))
_SYNC = message(b"S")


class BindExchange:
    """One attempt. Three round trips: a look at the function, the call, and the end of its statement, also after an error."""

    def __init__(self, nonce: str, listener: str) -> None:
        self._reader = MessageReader(ANSWER_BYTES_MAX)
        self._is_ours = False
        self._next = [_run(_STATEMENT, nonce, listener) + _SYNC, _CLOSE + _SYNC]
        """What to send at each ReadyForQuery but the last."""
        self.request = _run(BIND_IS_OURS) + _CLOSE + _SYNC
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
            if kind == Kind.READY_FOR_QUERY:
                for_backend += self._after_ready()
            elif kind == Kind.DATA_ROW and not self._is_ours:
                self._is_ours = text_columns(payload) == ["t"]
            elif kind == Kind.ERROR_RESPONSE:
                self.failed = True
                self.last_error = message(bytes((kind,)), payload)
            elif kind in _HAND_ON:
                for_client += message(bytes((kind,)), payload)
        return for_client, for_backend

    def _after_ready(self) -> bytes:
        if not self._is_ours:
            self.failed = True
            del self._next[:-1]
        if self._next:
            return self._next.pop(0)
        self.done = True
        return b""

    def take_rest(self) -> bytes:
        """What the backend sent after the exchange."""
        return self._reader.take_rest()


def _run(statement: bytes, *values: str) -> bytes:
    parameters = b"".join(int32(len(value.encode())) + value.encode() for value in values)
    name = cstring(_NAME)
    return (
        message(b"P", name + statement + b"\0" + int16(0))
        + message(b"B", name + name + int16(0) + int16(len(values)) + parameters + int16(0))
        + message(b"E", name + int32(0))
    )
