"""One batch of a client, up to its Query or Sync, cut into what a collect pass needs. Free of I/O."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from dbnode.sql.messages import HEADER_BYTES, Kind, int16

HELD_BYTES_MAX = 4 * 1024 * 1024
"""A longer batch is forwarded at once. So much of a client is held, besides what is being read."""
PREPARED_MAX = 256
"""Prepared statements of a session that are remembered; the oldest are forgotten first."""
PREPARED_CHARS_MAX = 32 * 1024
_DESCRIBING = b"PDH"
_INT32_BYTES, _INT16_BYTES = 4, 2


class Readiness(enum.Enum):
    """What is to be done with what has come so far."""

    INCOMPLETE = enum.auto()
    FORWARD = enum.auto()
    """Nothing to collect for."""
    DESCRIBED = enum.auto()
    """The same; it only prepares and describes, and ends with Flush."""
    COMPLETE = enum.auto()


@dataclass(frozen=True, slots=True)
class Prepared:
    """Text and parameter types of a Parse, as they came."""

    text: bytes = field(repr=False)
    types: bytes = int16(0)


@dataclass(frozen=True, slots=True)
class Batch:
    """One statement with its parameters."""

    prepared: Prepared
    parameters: bytes = field(default=int16(0) + int16(0), repr=False)
    """Format codes and values, as in Bind."""
    portal: bytes = b""
    num_rows: int = 0
    """As many as Execute asks for; 0 for all."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """An Execute of a portal that an earlier batch has bound."""

    portal: bytes
    num_rows: int


class PreparedStatements:
    """What a session has prepared that may call infer(), by name."""

    def __init__(self, may_call: Callable[[bytes], bool]) -> None:
        self._may_call = may_call
        self._by_name: dict[bytes, Prepared] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: bytes) -> bool:
        return name in self._by_name

    def get(self, name: bytes) -> Prepared | None:
        return self._by_name.get(name)

    def put(self, name: bytes, prepared: Prepared) -> None:
        self._by_name.pop(name, None)
        if len(prepared.text) <= PREPARED_CHARS_MAX and self._may_call(prepared.text):
            self._by_name[name] = prepared
            if len(self._by_name) > PREPARED_MAX:
                del self._by_name[next(iter(self._by_name))]

    def forget(self, name: bytes) -> None:
        self._by_name.pop(name, None)


class BatchReader:
    """Reads one batch, whose bytes its owner holds."""

    def __init__(self, known: PreparedStatements) -> None:
        self.held = b""
        """All that has come, also what follows the batch."""
        self.batch: Batch | Resumed | None = None
        """When it is complete."""
        self._known = known
        self._position = 0
        """Where the next message starts."""
        self._kinds = b""
        self._parsed: tuple[bytes, Prepared] | None = None
        self._bound: tuple[bytes, bytes] | None = None
        self._executed: Resumed | None = None

    def feed(self, data: bytes) -> Readiness:
        self.held += data
        while True:
            header_end = self._position + HEADER_BYTES
            if header_end > len(self.held):
                return self._incomplete(header_end)
            length = int.from_bytes(self.held[self._position + 1 : header_end], "big")
            end = self._position + 1 + length
            if end > len(self.held):
                return self._incomplete(end)
            kind, payload = self.held[self._position], self.held[header_end:end]
            is_first = self._position == 0
            self._position = end
            self._kinds += bytes((kind,))
            try:
                readiness = self._on_message(kind, payload, is_first)
            except ValueError:
                return Readiness.FORWARD  # malformed: PostgreSQL says how
            if readiness is not Readiness.INCOMPLETE:
                return readiness

    @property
    def whole(self) -> bytes:
        """A batch that is complete, as it came."""
        return self.held[: self._position]

    @property
    def rest(self) -> bytes:
        """What follows a batch that is complete."""
        return self.held[self._position :]

    def _incomplete(self, end: int) -> Readiness:
        return Readiness.INCOMPLETE if end <= HELD_BYTES_MAX else Readiness.FORWARD

    def _on_message(self, kind: int, payload: bytes, is_first: bool) -> Readiness:
        if kind == Kind.QUERY and is_first:
            self._known.forget(b"")
            self.batch = Batch(Prepared(payload[:-1]))
            return Readiness.COMPLETE
        if kind == Kind.PARSE and self._bound is None:
            name, text, types = payload.split(b"\0", 2)
            self._parsed = name, Prepared(text, types)
            self._known.put(*self._parsed)
        elif kind == Kind.BIND and self._bound is None:
            _portal, name, rest = payload.split(b"\0", 2)
            self._bound = name, _parameters(rest)
        elif kind == Kind.EXECUTE and (self._bound is not None or is_first) and self._executed is None:
            portal, _, num_rows = payload.partition(b"\0")
            self._executed = Resumed(portal, int.from_bytes(num_rows, "big"))
        elif kind == Kind.CLOSE and self._bound is None:
            if payload[:1] == b"S":
                self._known.forget(payload[1:-1])
                self._parsed = None
        elif kind == Kind.FLUSH:
            is_last = self._position == len(self.held)
            return Readiness.DESCRIBED if is_last and self._kinds == _DESCRIBING else Readiness.FORWARD
        elif kind == Kind.SYNC:
            return self._complete()
        elif kind not in (Kind.DESCRIBE, Kind.CLOSE):
            return Readiness.FORWARD
        return Readiness.INCOMPLETE

    def _complete(self) -> Readiness:
        if self._executed is None:
            return Readiness.FORWARD
        if self._bound is None:
            self.batch = self._executed
            return Readiness.COMPLETE
        name, parameters = self._bound
        prepared = self._known.get(name)
        if prepared is None and self._parsed is not None and self._parsed[0] == name:
            prepared = self._parsed[1]
        if prepared is None:
            return Readiness.FORWARD
        self.batch = Batch(prepared, parameters, self._executed.portal, self._executed.num_rows)
        return Readiness.COMPLETE


def _parameters(rest: bytes) -> bytes:
    """The part of a Bind before the formats of the result. Raises ValueError."""
    position = _INT16_BYTES + _INT16_BYTES * _number(rest, 0, _INT16_BYTES)
    count = _number(rest, position, _INT16_BYTES)
    position += _INT16_BYTES
    for _ in range(count):
        length = _number(rest, position, _INT32_BYTES)
        position += _INT32_BYTES + max(length, 0)
    if position + _INT16_BYTES > len(rest):
        raise ValueError("Bind is cut short")
    return rest[:position]


def _number(data: bytes, position: int, size_bytes: int) -> int:
    """Negative counts are refused; a negative length means NULL. Raises ValueError."""
    if position + size_bytes > len(data):
        raise ValueError("Bind is cut short")
    return int.from_bytes(data[position : position + size_bytes], "big", signed=size_bytes == _INT32_BYTES)


def bound_statement(data: bytes) -> bytes | None:
    """Name of the statement that a Bind at the beginning of `data` is for; None if it is not all there."""
    words = data[HEADER_BYTES:].split(b"\0", 2)
    return words[1] if len(words) == 3 else None


def statement_text(data: bytes, known: PreparedStatements) -> bytes | None:
    """Text of the statement that a Query, Parse or Bind at the beginning of `data` is about; None if it is not all there."""
    kind, end = data[0], 1 + int.from_bytes(data[1:HEADER_BYTES], "big")
    if kind == Kind.BIND:
        name = bound_statement(data)
        prepared = known.get(name) if name is not None else None
        return prepared.text if prepared is not None else None
    if end > len(data):
        return None
    words = data[HEADER_BYTES:end].split(b"\0", 2)
    return words[kind == Kind.PARSE]
