"""The PUB socket that events leave by. A subscriber that does not read loses events; nobody waits for it."""

from __future__ import annotations

import zmq

from stratakv.pool.auth import PoolCredentials
from stratakv.pool.member_sockets import listen_on, serve_members
from stratakv.wire_events import PoolEvent, encode_event

EVENTS_QUEUED_MAX = 1000
"""Per subscriber, of up to 32 KiB each; what comes then is lost for it, which it sees by the numbers."""


class EventSocket:
    """A bound PUB."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], credentials: PoolCredentials | None) -> None:
        """In the context of the ROUTER socket, whose gatekeeper asks subscribers for their key, too."""
        self._socket = context.socket(zmq.PUB)
        if credentials is not None:
            serve_members(self._socket, credentials)

    def bind(self, host: str, port: int) -> int:
        """Listen; the port (a free one for 0). Raises SetupError."""
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, EVENTS_QUEUED_MAX)
        return listen_on(self._socket, host, port, "meta.events_port")

    def publish(self, event: PoolEvent) -> None:
        self._socket.send(encode_event(event), zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close()
