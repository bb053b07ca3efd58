"""Statements of the gateway's own on a client's backend. Free of I/O.

They go out between a client's statements, as named statements and portals of the extended protocol: the client's unnamed ones
survive, which a simple Query would destroy. Their answers are swallowed; what PostgreSQL may send at any time is handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dbnode.sql.errors import MessageTooLong
from dbnode.sql.messages import Kind, MessageReader, cstring, int16, int32, message

KEPT_BYTES_MAX = 64 * 1024
"""Longest message that is looked at; a NOTIFY carries up to 8,000 bytes. Longer ones are rows, and read over."""
_HAND_ON = (Kind.NOTIFICATION_RESPONSE, Kind.PARAMETER_STATUS)
_SYNC = message(b"S")
_ENDING = (b"\0VFATAL\0", b"\0VPANIC\0")


@dataclass(frozen=True, slots=True)
class OwnStatement:
    """Text with its parameters, as Parse and Bind carry them."""

    name: str
    text: bytes
    types: bytes = int16(0)
    parameters: bytes = field(default=int16(0) + int16(0), repr=False)

    def run(self) -> bytes:
        """Parse, Bind and Execute, with results as text."""
        name = cstring(self.name)
        return (
            message(b"P", name + self.text + b"\0" + self.types)
            + message(b"B", name + name + self.parameters + int16(0))
            + message(b"E", name + int32(0))
        )

    def close(self) -> bytes:
        """Within the client's transaction portals stay open."""
        name = cstring(self.name)
        return message(b"C", b"P" + name) + message(b"C", b"S" + name)


def text_parameters(values: Sequence[str]) -> bytes:
    """For `OwnStatement.parameters`."""
    encoded = [value.encode() for value in values]
    return int16(0) + int16(len(encoded)) + b"".join(int32(len(value)) + value for value in encoded)


class OwnExchange:
    """Runs `statements` in a row, up to the first error, then `last` likewise in any case; all of them are closed.

    With `sync_first` an extended batch that the client has flushed but not ended is ended first.
    """

    def __init__(
        self, statements: Sequence[OwnStatement], last: Sequence[OwnStatement] = (), *, sync_first: bool = False
    ) -> None:
        self._reader = MessageReader(KEPT_BYTES_MAX, skip_too_long=True)
        parts = [_SYNC] if sync_first else []
        for group in (statements, last):
            if group:
                parts += [statement.run() for statement in group]
                parts.append(_SYNC)
        parts += [statement.close() for statement in (*statements, *last)]
        parts.append(_SYNC)
        self._num_ready = parts.count(_SYNC)
        self.request = b"".join(parts)
        """What to send."""
        self._hands_all_on = False
        self.done = False
        self.first_error = b""
        """An ErrorResponse, as the next."""
        self.last_error = b""
        self.transaction_status = 0
        self.row: bytes | None = None
        """The last DataRow."""

    @property
    def has_ended_session(self) -> bool:
        """Whether the backend has ended by the last error: the client must see it."""
        return any(severity in self.last_error for severity in _ENDING)

    @classmethod
    def of_client(cls, batch: bytes) -> OwnExchange:
        """Messages of the client's without the Sync that it sends later; all answers but ReadyForQuery are handed on."""
        exchange = cls(())
        exchange.request = batch + _SYNC
        exchange._hands_all_on = True
        return exchange

    def feed(self, data: bytes) -> bytes:
        """Bytes for the client. Raises ProtocolViolation."""
        self._reader.feed(data)
        for_client = b""
        while not self.done:
            try:
                parsed = self._reader.next_message()
            except MessageTooLong:
                continue
            if parsed is None:
                break
            kind, payload = parsed
            if kind == Kind.READY_FOR_QUERY:
                self._num_ready -= 1
                self.transaction_status = payload[0]
                self.done = self._num_ready == 0
                continue
            if self._hands_all_on or kind in _HAND_ON:
                for_client += message(bytes((kind,)), payload)
            if kind == Kind.ERROR_RESPONSE:
                self.last_error = message(bytes((kind,)), payload)
                self.first_error = self.first_error or self.last_error
            elif kind == Kind.DATA_ROW:
                self.row = payload
        return for_client

    def take_rest(self) -> bytes:
        """What the backend sent after the exchange."""
        return self._reader.take_rest()


def text_columns(row: bytes) -> list[str | None]:
    """Values of a DataRow of text."""
    count = int.from_bytes(row[:2], "big")
    position, values = 2, []
    for _ in range(count):
        length = int.from_bytes(row[position : position + 4], "big", signed=True)
        position += 4
        values.append(None if length < 0 else row[position : position + length].decode(errors="replace"))
        position += max(length, 0)
    return values
