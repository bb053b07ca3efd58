"""The server's side of PostgreSQL's protocol for SHOW commands, simple and extended. Free of I/O.

Statements have no parameters and portals are read to their end at once, so little of it has a state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dbnode.sql.admin.table import Table
from dbnode.sql.errors import NotSupported, ProtocolViolation
from dbnode.sql.lexer import UnreadableSql, tokenize
from dbnode.sql.messages import Kind, MessageReader, Severity, cstring, error_response, int16, message, ready_for_query
from stratakv.errors import InvalidRequest, StrataError

MESSAGE_BYTES_MAX = 64 * 1024
NAMES_MAX = 100
"""Prepared statements, and portals."""
STATEMENTS_MAX = 16
"""In one query string."""
ANSWER_BYTES_MAX = 64 * 1024
"""What is answered goes out when it is so long; the rest of what was asked waits until the client has read."""
_READY = ready_for_query()
_EMPTY = message(b"I")
_COMPLETE = message(b"C", cstring("SHOW"))
_NO_DATA = message(b"n")
_INT16_BYTES = 2
T = TypeVar("T")


class NoSuchName(InvalidRequest):
    """A prepared statement or portal that does not exist."""

    sqlstate = "26000"


class AdminProtocol:
    """One client's conversation."""

    def __init__(self, show: Callable[[str], Table]) -> None:
        """`show` runs a statement. Raises StrataError."""
        self._show = show
        self._reader = MessageReader(MESSAGE_BYTES_MAX)
        self._statements: dict[bytes, str] = {}
        self._portals: dict[bytes, tuple[Table | None, tuple[int, ...]]] = {}
        self._is_skipping = False
        """After an error, until Sync."""
        self.has_ended = False
        """The client has said goodbye."""

    def feed(self, data: bytes) -> None:
        """What the client has sent."""
        self._reader.feed(data)

    def answers(self) -> bytes:
        """What it is answered next; nothing if all is answered. Raises ProtocolViolation."""
        found = bytearray()
        while not self.has_ended and len(found) < ANSWER_BYTES_MAX:
            parsed = self._reader.next_message()
            if parsed is None:
                break
            found += self._answer(*parsed)
        return bytes(found)

    def _answer(self, kind: int, payload: bytes) -> bytes:
        if kind == Kind.SYNC:
            self._is_skipping = False
            self._portals.clear()
            return _READY
        if kind == Kind.TERMINATE:
            self.has_ended = True
        if self.has_ended or self._is_skipping:
            return b""
        try:
            if kind == Kind.QUERY:
                return self._query(payload)
            return self._extended(kind, payload)
        except ProtocolViolation:
            raise
        except StrataError as error:
            self._is_skipping = kind != Kind.QUERY
            return error_response(error, Severity.ERROR) + (_READY if kind == Kind.QUERY else b"")

    def _query(self, payload: bytes) -> bytes:
        parts = []
        for statement in _split(_text(payload[:-1])) or [""]:
            table = self._run(statement)
            parts.append(_EMPTY if table is None else table.description(()) + table.data(()) + _COMPLETE)
        return b"".join([*parts, _READY])

    def _run(self, statement: str) -> Table | None:
        return self._show(statement) if statement else None

    def _extended(self, kind: int, payload: bytes) -> bytes:
        if kind == Kind.PARSE:
            return self._parse(payload)
        if kind == Kind.BIND:
            return self._bind(payload)
        if kind == Kind.DESCRIBE:
            return self._describe(payload)
        if kind == Kind.EXECUTE:
            table, formats = _found(self._portals, payload.partition(b"\0")[0])
            return _EMPTY if table is None else table.data(formats) + _COMPLETE
        if kind == Kind.CLOSE:
            if payload[:1] == b"S":
                self._statements.pop(payload[1:-1], None)
            else:
                self._portals.pop(payload[1:-1], None)
            return message(b"3")
        if kind == Kind.FLUSH:
            return b""
        raise NotSupported("the admin database knows queries only")

    def _parse(self, payload: bytes) -> bytes:
        name, text, _types = _words(payload, 3)
        statements = _split(_text(text))
        if len(statements) > 1:
            raise NotSupported("cannot insert multiple commands into a prepared statement")
        _put(self._statements, name, statements[0] if statements else "")
        return message(b"1")

    def _bind(self, payload: bytes) -> bytes:
        portal, name, rest = _words(payload, 3)
        statement = _found(self._statements, name)
        num_formats, rest = _count(rest)
        num_values, rest = _count(rest[_INT16_BYTES * num_formats :])
        if num_values:
            raise NotSupported("statements of the admin database have no parameters")
        num_results, rest = _count(rest)
        formats = tuple(
            int.from_bytes(rest[i : i + _INT16_BYTES], "big")
            for i in range(0, _INT16_BYTES * num_results, _INT16_BYTES)
        )
        _put(self._portals, portal, (self._run(statement), formats))
        return message(b"2")

    def _describe(self, payload: bytes) -> bytes:
        if payload[:1] == b"S":
            table = self._run(_found(self._statements, payload[1:-1]))
            return message(b"t", int16(0)) + (_NO_DATA if table is None else table.description(()))
        table, formats = _found(self._portals, payload[1:-1])
        return _NO_DATA if table is None else table.description(formats)


def _split(text: str) -> list[str]:
    """Statements between semicolons. Raises NotSupported."""
    try:
        tokens = list(tokenize(text))
    except UnreadableSql as error:
        raise NotSupported(f"this cannot be read: {error}") from None
    found: list[list[str]] = [[]]
    for token in tokens:
        if text[token.start] == ";":
            found.append([])
        else:
            found[-1].append(text[token.start : token.end])
    statements = [" ".join(words) for words in found if words]
    if len(statements) > STATEMENTS_MAX:
        raise NotSupported(f"more than {STATEMENTS_MAX} statements at once")
    return statements


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _words(payload: bytes, count: int) -> list[bytes]:
    words = payload.split(b"\0", count - 1)
    if len(words) != count:
        raise ProtocolViolation("malformed message")
    return words


def _count(data: bytes) -> tuple[int, bytes]:
    if len(data) < _INT16_BYTES:
        raise ProtocolViolation("malformed message")
    return int.from_bytes(data[:_INT16_BYTES], "big"), data[_INT16_BYTES:]


def _put(names: dict[bytes, T], name: bytes, value: T) -> None:
    names[name] = value
    if len(names) > NAMES_MAX:
        del names[next(iter(names))]


def _found(names: dict[bytes, T], name: bytes) -> T:
    try:
        return names[name]
    except KeyError:
        raise NoSuchName("there is no prepared statement or portal of this name") from None
