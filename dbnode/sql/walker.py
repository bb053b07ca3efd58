"""Follows the messages of an open session, whose bytes are forwarded as they come. Free of I/O.

Every byte of every session comes through a walker, so there are two that do the same: one in C++ (`stratakv._native`) and, where
that was not built, one in Python.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Protocol

from dbnode.sql.errors import ProtocolViolation
from dbnode.sql.messages import HEADER_BYTES, MESSAGE_BYTES_MAX, TRANSACTION_IDLE, Kind
from stratakv import _native

_LENGTH_BYTES = 4
_READY_FOR_QUERY = int(Kind.READY_FOR_QUERY)
_header_at = struct.Struct("!Bi").unpack_from


class MessageWalker(Protocol):
    """Finds message boundaries in a stream that is cut anywhere, and reports the messages of watched kinds.

    Keeps at most one header. The stream must start at a boundary.
    """

    at_boundary: bool
    """Whether the next byte starts a message."""
    last_kind: int
    """Of the last message whose header has been seen."""
    transaction_status: int
    """Of the last ReadyForQuery."""
    was_idle: bool
    """Some ReadyForQuery has told of no transaction, since its reader has set this back."""

    def feed(self, data: bytes, /) -> Sequence[int]:
        """Kinds of the watched messages whose header ends in `data`. Raises ProtocolViolation."""


def make_walker(watched: Iterable[int]) -> MessageWalker:
    """The faster one of those there are."""
    walker = _native.message_walker()
    kinds = bytes(map(int, watched))
    return PythonWalker(kinds) if walker is None else walker(kinds, ProtocolViolation)


class PythonWalker:
    """In Python."""

    __slots__ = ("_partial", "_skip_bytes", "_watched", "at_boundary", "last_kind", "transaction_status", "was_idle")

    def __init__(self, watched: bytes) -> None:
        self._watched = frozenset(watched)
        self._skip_bytes = 0
        self._partial = b""
        self.at_boundary = True
        self.last_kind = 0
        self.transaction_status = 0
        self.was_idle = False

    def feed(self, data: bytes, /) -> Sequence[int]:
        if self._partial:
            data = self._partial + data
            self._partial = b""
        position, end, last_kind = self._skip_bytes, len(data), self.last_kind
        watched, last_header = self._watched, end - HEADER_BYTES
        found = []
        while position <= last_header:
            kind, length = _header_at(data, position)
            if not _LENGTH_BYTES <= length < MESSAGE_BYTES_MAX:
                raise ProtocolViolation("invalid message length")
            if kind in watched:
                if kind == _READY_FOR_QUERY:
                    if position == last_header:
                        break  # the status is still to come
                    self.transaction_status = status = data[position + HEADER_BYTES]
                    if status == TRANSACTION_IDLE:
                        self.was_idle = True
                found.append(kind)
            last_kind = kind
            position += length + 1
        self.last_kind = last_kind
        self._skip_bytes = 0
        if position < end:
            self._partial = data[position:]
        else:
            self._skip_bytes = position - end
        self.at_boundary = position == end
        return found
