"""The two ends of a session: what each does with the bytes that arrive, by the session's phase. Made by `Session`.

All traffic comes through `data_received`: for an open session it decides on the first byte and one search, then forwards
the buffer as it came.

What is written to one side while its buffer is full stops the reading of the other.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, cast

from dbnode.sql.client_batch import HELD_BYTES_MAX
from dbnode.sql.errors import ProtocolViolation
from dbnode.sql.walker import make_walker
from stratakv.errors import PermissionDenied

if TYPE_CHECKING:
    from dbnode.sql.session import Session

BUFFER_BYTES_MAX = 256 * 1024
"""Unsent bytes at which the other side is no longer read."""
LINGER_S = 10.0
"""A closed side gets so long to take what is still unsent."""


class Phase(enum.Enum):
    """Where a session is."""

    CONNECTING = enum.auto()
    LOGIN = enum.auto()
    OPEN = enum.auto()
    BINDING = enum.auto()
    """A statement of the gateway's own runs before the client's."""
    HOLDING = enum.auto()
    """A batch that is not whole yet is held."""
    COLLECTING = enum.auto()
    """It is whole, and still held."""
    WAITING = enum.auto()
    """What the client sends is held until PostgreSQL has done what it was sent."""
    REPLICATION = enum.auto()
    ADMIN = enum.auto()
    """In the admin database: PostgreSQL is not asked any more."""
    CLOSED = enum.auto()


_OPEN = Phase.OPEN  # a name of the module is found faster than a member of an enum
FOLLOWED = frozenset({Phase.OPEN, Phase.HOLDING, Phase.COLLECTING, Phase.WAITING})
"""Phases in which both sides are an ordinary session's."""


class Side(asyncio.Protocol):
    """What both ends have in common."""

    def __init__(self, session: Session, watched: frozenset[int]) -> None:
        self.session = session
        self.walker = make_walker(watched)
        self.transport: asyncio.Transport | None = None
        self.is_full = False
        self._linger: asyncio.TimerHandle | None = None

    def attach(self, transport: asyncio.BaseTransport) -> None:
        """Take over an open transport."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=BUFFER_BYTES_MAX)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.attach(transport)

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Send what is buffered, for a bounded time, and close."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
            self._linger = asyncio.get_running_loop().call_later(LINGER_S, self.transport.abort)

    def closed(self) -> None:
        if self._linger is not None:
            self._linger.cancel()

    def stop_reading(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def read_on(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()


class ClientSide(Side):
    """The client's connection."""

    is_touched = False
    """Something has come since this was last reset."""

    def data_received(self, data: bytes) -> None:
        session = self.session
        self.is_touched = True
        try:
            if session.phase is _OPEN:
                if not self.walker.at_boundary or session.is_plain(data) or not session.keeps(data):
                    self.forward(data)
            elif session.phase is Phase.HOLDING:
                session.lookahead.hold(data)  # type: ignore[union-attr]
            elif session.phase is Phase.COLLECTING:
                session.lookahead.add(data)  # type: ignore[union-attr]
            elif session.phase is Phase.REPLICATION:
                session.backend.write(data)
            elif session.phase is Phase.ADMIN:
                session.console.feed(data)  # type: ignore[union-attr]
            elif session.phase is Phase.LOGIN:
                session.on_client_messages(self.walker.feed(data))
                session.on_client_login_data(data)
            elif session.phase is not Phase.CLOSED:
                session.hold_more(data)
        except (ProtocolViolation, PermissionDenied) as error:
            session.end(error)

    def forward(self, data: bytes) -> None:
        """Of an open session. Raises ProtocolViolation."""
        found = self.walker.feed(data)
        if found:
            self.session.on_client_messages(found)
        self.session.traffic.received_bytes += len(data)
        self.session.backend.transport.write(data)  # type: ignore[union-attr]

    def pause_writing(self) -> None:
        self.is_full = True
        self.session.backend.stop_reading()

    def resume_writing(self) -> None:
        self.is_full = False
        if self.session.console is None:
            self.session.backend.read_on()
        elif self.session.console.is_open:
            self.session.console.resume()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed()
        self.session.on_client_lost()


class BackendSide(Side):
    """The connection to PostgreSQL."""

    def data_received(self, data: bytes) -> None:
        session = self.session
        try:
            if session.exchange is not None:
                session.on_own_data(data)
            elif session.phase is _OPEN or session.phase in FOLLOWED:
                found = self.walker.feed(data)
                if session.notices is not None:
                    data = session.notices.feed(data)
                session.traffic.sent_bytes += len(data)
                session.client.transport.write(data)  # type: ignore[union-attr]
                if found:
                    session.on_backend_messages(found)
            elif session.phase is Phase.REPLICATION:
                session.client.write(data)
            elif session.phase is Phase.LOGIN:
                session.on_login_data(data)
        except (ProtocolViolation, PermissionDenied) as error:
            session.end(error)

    def pause_writing(self) -> None:
        self.is_full = True
        self.session.client.stop_reading()

    def resume_writing(self) -> None:
        self.is_full = False
        if self.session.phase is not Phase.BINDING and len(self.session.held) <= HELD_BYTES_MAX:
            self.session.client.read_on()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed()
        self.session.on_backend_lost()
