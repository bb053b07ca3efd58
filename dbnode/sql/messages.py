"""Messages of PostgreSQL's protocol 3, made and walked. Free of I/O; used by the relay and by the private listener.

https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence

from dbnode.sql.errors import MessageTooLong, ProtocolViolation
from stratakv.errors import StrataError

HEADER_BYTES = 5
"""Kind and length; the length counts itself but not the kind."""
MESSAGE_BYTES_MAX = 1 << 30
"""PostgreSQL takes and sends no longer ones; a length counts its own four bytes."""
TRANSACTION_IDLE = ord("I")
TRANSACTION_OPEN = ord("T")
TRANSACTION_FAILED = ord("E")
_INT32 = struct.Struct("!i")
_INT16 = struct.Struct("!h")
_INT32_BYTES = _INT32.size
_HEADER = struct.Struct("!ci")
_TEXT_OID = 25


class Kind(enum.IntEnum):
    """First byte of the messages that we look at."""

    AUTHENTICATION = ord("R")
    BIND = ord("B")
    BACKEND_KEY_DATA = ord("K")
    CLOSE = ord("C")
    COPY_IN_RESPONSE = ord("G")
    DATA_ROW = ord("D")
    DESCRIBE = ord("D")
    ERROR_RESPONSE = ord("E")
    EXECUTE = ord("E")
    FLUSH = ord("H")
    FUNCTION_CALL = ord("F")
    NO_DATA = ord("n")
    NOTICE_RESPONSE = ord("N")
    NOTIFICATION_RESPONSE = ord("A")
    PARAMETER_STATUS = ord("S")
    PARSE = ord("P")
    PASSWORD = ord("p")
    QUERY = ord("Q")
    READY_FOR_QUERY = ord("Z")
    ROW_DESCRIPTION = ord("T")
    SYNC = ord("S")
    TERMINATE = ord("X")


class AuthenticationCode(enum.IntEnum):
    """First word of an Authentication message, of those that we look at."""

    OK = 0
    SASL = 10
    SASL_CONTINUE = 11
    SASL_FINAL = 12


class Severity(enum.StrEnum):
    """How an ErrorResponse ends: the statement or the session."""

    ERROR = "ERROR"
    FATAL = "FATAL"


class MessageReader:
    """Cuts a stream into whole messages of a bounded size.

    With `skip_too_long` a longer message is read to its end without being kept, and told then.
    """

    __slots__ = ("_buffer", "_bytes_max", "_skip_bytes", "_skip_too_long", "_skipping")

    def __init__(self, bytes_max: int, *, skip_too_long: bool = False) -> None:
        self._buffer = bytearray()
        self._bytes_max = bytes_max
        self._skip_too_long = skip_too_long
        self._skip_bytes = 0
        self._skipping = False

    def feed(self, data: bytes) -> None:
        skipped = min(self._skip_bytes, len(data))
        self._skip_bytes -= skipped
        self._buffer += data[skipped:]

    def next_message(self) -> tuple[int, bytes] | None:
        """Kind and payload, or None until more is fed. Raises ProtocolViolation, MessageTooLong."""
        if self._skipping:
            if self._skip_bytes:
                return None
            self._skipping = False
            raise MessageTooLong(f"the message is longer than {self._bytes_max} bytes")
        if len(self._buffer) < HEADER_BYTES:
            return None
        length = _INT32.unpack_from(self._buffer, 1)[0]
        if length < _INT32.size or (length > self._bytes_max and not self._skip_too_long):
            raise ProtocolViolation("invalid message length")
        if length > self._bytes_max:
            self._start_skipping(length + 1)
            return self.next_message()
        if len(self._buffer) <= length:
            return None
        kind, payload = self._buffer[0], bytes(self._buffer[HEADER_BYTES : length + 1])
        del self._buffer[: length + 1]
        return kind, payload

    def _start_skipping(self, size_bytes: int) -> None:
        there = min(size_bytes, len(self._buffer))
        del self._buffer[:there]
        self._skip_bytes = size_bytes - there
        self._skipping = True

    def take_rest(self) -> bytes:
        """What follows the last message; the reader is empty then."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest


def message(kind: bytes, payload: bytes = b"") -> bytes:
    """One message, with its header."""
    return _HEADER.pack(kind, len(payload) + _INT32.size) + payload


def int16(value: int) -> bytes:
    return _INT16.pack(value)


def int32(value: int) -> bytes:
    return _INT32.pack(value)


def cstring(text: str) -> bytes:
    """Text as the protocol ends it; a NUL within would cut it short."""
    return text.replace("\0", "").encode() + b"\0"


def authentication(code: AuthenticationCode, payload: bytes = b"") -> bytes:
    return message(b"R", int32(code) + payload)


def error_response(error: StrataError, severity: Severity) -> bytes:
    """The error as libpq shows it."""
    fields = {"S": severity.value, "V": severity.value, "C": error.sqlstate, "M": error.message}
    if error.hint:
        fields["H"] = error.hint
    return message(b"E", b"".join(name.encode() + cstring(text) for name, text in fields.items()) + b"\0")


def ready_for_query(transaction_status: int = TRANSACTION_IDLE) -> bytes:
    return message(b"Z", bytes((transaction_status,)))


def parameter_status(name: str, value: str) -> bytes:
    return message(b"S", cstring(name) + cstring(value))


def text_row(columns: Sequence[tuple[str, str | None]]) -> bytes:
    """The whole answer to a simple query: one row of text columns."""
    description, row = int16(len(columns)), int16(len(columns))
    for name, value in columns:
        description += cstring(name) + struct.pack("!ihihih", 0, 0, _TEXT_OID, -1, -1, 0)
        if value is None:
            row += int32(-1)
        else:
            encoded = value.encode()
            row += int32(len(encoded)) + encoded
    complete = message(b"C", cstring("SELECT 1"))
    return message(b"T", description) + message(b"D", row) + complete + ready_for_query()
