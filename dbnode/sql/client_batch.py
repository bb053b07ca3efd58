"""One batch of a client, up to its Query or Sync, cut into what a collect pass needs. Free of I/O."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from dbnode.sql.messages import HEADER_BYTES, Kind, int16

HELD_BYTES_MAX = 4 * 1024 * 1024
"""A longer batch is forwarded at once. So much of a client is held, besides what is being read."""
PREPARED_MAX = 256
"""Prepared statements of a session that are remembered; the oldest are forgotten first."""
PREPARED_CHARS_MAX = 32 * 1024
_DESCRIBING = b"PDH"
_OPENING = re.compile(rb"\s*(?:BEGIN|START\s+TRANSACTION)\b[\w\s,]*;?\s*", re.IGNORECASE)
_OPENING_BYTES_MAX = 128
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

    @property
    def is_opening(self) -> bool:
        """Whether it begins a transaction block."""
        return _OPENING.fullmatch(self.text) is not None


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
    """What a session has prepared that may call infer(), by name; and BEGIN, which drivers prepare too."""

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
        is_known = self._may_call(prepared.text) or (name and prepared.is_opening)
        if len(prepared.text) <= PREPARED_CHARS_MAX and is_known:
            self._by_name[name] = prepared
            if len(self._by_name) > PREPARED_MAX:
                del self._by_name[next(iter(self._by_name))]

    def forget(self, name: bytes) -> None:
        self._by_name.pop(name, None)

    def may_be_called(self, data: bytes) -> bool:
        """Whether messages may call infer(), by their text or by the name of what was prepared."""
        return self._may_call(data) or any(
            b"\0" + name + b"\0" in data for name, prepared in self._by_name.items() if name and not prepared.is_opening
        )


class BatchReader:
    """Reads one batch, whose bytes its owner holds."""

    def __init__(self, known: PreparedStatements) -> None:
        self.held = b""
        """All that has come, also what follows the batch."""
        self.batch: Batch | Resumed | None = None
        """When it is complete."""
        self._known = known
        self.opening_bytes = 0
        """Length of what only begins a transaction block, ahead of the statement and without a Sync between them."""
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
            start, self._position = self._position, end
            if kind in (Kind.PARSE, Kind.BIND) and self._has_opened:
                self.opening_bytes = start
                self._parsed = self._bound = self._executed = None
            self._kinds += bytes((kind,))
            try:
                readiness = self._on_message(kind, payload, start == 0)
            except ValueError:
                return Readiness.FORWARD  # malformed: PostgreSQL says how
            if readiness is not Readiness.INCOMPLETE:
                return readiness

    @property
    def is_complete(self) -> bool:
        """Whether the end of the batch has come, and it was understood."""
        return self.batch is not None

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
        prepared = self._prepared
        if prepared is None:
            return Readiness.FORWARD
        self.batch = Batch(prepared, self._bound[1], self._executed.portal, self._executed.num_rows)
        return Readiness.COMPLETE

    @property
    def _prepared(self) -> Prepared | None:
        """What is bound."""
        name = self._bound[0] if self._bound is not None else None
        if name is not None and self._parsed is not None and self._parsed[0] == name:
            return self._parsed[1]
        return self._known.get(name) if name is not None else None

    @property
    def _has_opened(self) -> bool:
        """Whether all until now, which has no end yet, is one BEGIN."""
        if self.opening_bytes or self._executed is None or self._bound is None:
            return False
        prepared = self._prepared
        return prepared is not None and prepared.is_opening


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


def opening(data: bytes, known: PreparedStatements) -> Prepared | None:
    """What a Query, Parse or Bind at the beginning of `data` is about, if that begins a transaction block."""
    end = 1 + int.from_bytes(data[1:HEADER_BYTES], "big")
    if end > min(len(data), _OPENING_BYTES_MAX):
        return None
    text = statement_text(data[:end], known)
    prepared = Prepared(text) if text is not None else None
    return prepared if prepared is not None and prepared.is_opening else None


def may_prepare_opening(data: bytes) -> bool:
    """Whether a message may be a Parse of BEGIN that has a name. Asked about every Query and Parse."""
    return data[HEADER_BYTES : HEADER_BYTES + 1] != b"\0" and b"\0BEGIN\0" in data[:_OPENING_BYTES_MAX]


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
