"""The two ends of a session: what each does with the bytes that arrive, by the session's phase. Made by `Session`.

What is written to one side while its buffer is full stops the reading of the other.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, cast

from dbnode.sql.errors import PasswordlessLogin, ProtocolViolation
from dbnode.sql.messages import MessageWalker

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
    PLANNING = enum.auto()
    """PostgreSQL plans a statement and does not run it; what the client sends after it is held."""
    REPLICATION = enum.auto()
    CLOSED = enum.auto()


FOLLOWED = frozenset({Phase.OPEN, Phase.HOLDING, Phase.COLLECTING, Phase.PLANNING})
"""Phases in which both sides are an ordinary session's."""


class Side(asyncio.Protocol):
    """What both ends have in common."""

    def __init__(self, session: Session, watched: frozenset[int]) -> None:
        self.session = session
        self.walker = MessageWalker(watched)
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

    def data_received(self, data: bytes) -> None:
        session = self.session
        try:
            if session.phase is Phase.OPEN:
                calls = session.calls
                if (
                    (calls.is_stale or session.has_changed_views)
                    and self.walker.at_boundary
                    and session.must_learn(data)
                ):
                    session.start_learning(data)
                    return
                if session.may_bind and self.walker.at_boundary and session.must_bind(data):
                    session.start_bind(data)
                    return
                if session.lookahead is not None and self.walker.at_boundary and session.lookahead.wants(data):
                    session.phase = Phase.HOLDING
                    session.lookahead.hold(data)
                    return
                self.forward(data)
            elif session.phase is Phase.HOLDING:
                session.lookahead.hold(data)  # type: ignore[union-attr]
            elif session.phase is Phase.COLLECTING:
                session.lookahead.add(data)  # type: ignore[union-attr]
            elif session.phase is Phase.REPLICATION:
                session.backend.write(data)
            elif session.phase is Phase.LOGIN:
                session.on_client_messages(self.walker.feed(data))
                session.backend.write(data)
            elif session.phase is not Phase.CLOSED:
                session.held += data
        except ProtocolViolation as error:
            session.end(error)

    def forward(self, data: bytes) -> None:
        """Of an open session. Raises ProtocolViolation."""
        found = self.walker.feed(data)
        if found:
            self.session.on_client_messages(found)
        self.session.backend.transport.write(data)  # type: ignore[union-attr]

    def pause_writing(self) -> None:
        self.session.backend.stop_reading()

    def resume_writing(self) -> None:
        self.session.backend.read_on()

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
            elif session.phase in FOLLOWED:
                found = self.walker.feed(data)
                if session.notices is not None:
                    data = session.notices.feed(data)
                session.client.transport.write(data)  # type: ignore[union-attr]
                if found:
                    session.on_backend_messages(found)
            elif session.phase is Phase.REPLICATION:
                session.client.write(data)
            elif session.phase is Phase.LOGIN:
                session.on_login_data(data)
        except (ProtocolViolation, PasswordlessLogin) as error:
            session.end(error)

    def pause_writing(self) -> None:
        self.is_full = True
        self.session.client.stop_reading()

    def resume_writing(self) -> None:
        self.is_full = False
        if self.session.phase not in (Phase.BINDING, Phase.PLANNING):
            self.session.client.read_on()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed()
        self.session.on_backend_lost()
