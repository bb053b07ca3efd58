"""TLS between a client and PostgreSQL itself: what goes through is ciphertext, and is not looked at. Made by `Relay`.

So there are no hints, no binding, and no telling how a session stands: at a drain it ends when the grace is over.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from dbnode.sql.sides import BUFFER_BYTES_MAX, LINGER_S

if TYPE_CHECKING:
    from dbnode.sql.relay import Relay


class Passage:
    """Two connections, each with the other's bytes."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._sides: tuple[_Side, _Side] | None = None

    def start(self, client: asyncio.Transport, backend: asyncio.Transport, received: bytes) -> None:
        """Both are paused; `received` is what the client has said to PostgreSQL already."""
        one, other = _Side(self, client), _Side(self, backend)
        one.other, other.other = backend, client
        self._sides = (one, other)
        backend.write(received)
        for side in self._sides:
            side.transport.set_write_buffer_limits(high=BUFFER_BYTES_MAX)
            side.transport.set_protocol(side)
            side.transport.resume_reading()

    def close(self) -> None:
        """Deliver what was read, for a bounded time, and close both."""
        sides, self._sides = self._sides, None
        if sides is None:
            return
        for side in sides:
            side.close()
        self._relay.on_passage_close(self)


class _Side(asyncio.Protocol):
    other: asyncio.Transport

    def __init__(self, passage: Passage, transport: asyncio.Transport) -> None:
        self._passage = passage
        self.transport = transport
        self._linger: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self.other.write(data)

    def pause_writing(self) -> None:
        if not self.other.is_closing():
            self.other.pause_reading()

    def resume_writing(self) -> None:
        if not self.other.is_closing():
            self.other.resume_reading()

    def close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
            self._linger = asyncio.get_running_loop().call_later(LINGER_S, self.transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        if self._linger is not None:
            self._linger.cancel()
        self._passage.close()
