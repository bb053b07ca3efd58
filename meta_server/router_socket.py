"""The ROUTER socket on the event loop: frames in, frames out, nothing of what they mean.

Read straight from zmq's file descriptor, which costs a third of a round trip less than `zmq.asyncio`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq
from zmq.auth.thread import ThreadAuthenticator

from stratakv.pool.auth import PoolCredentials
from stratakv.pool.member_sockets import gatekeeper, listen_on, serve_members
from stratakv.wire import MESSAGE_BYTES_MAX

READS_PER_TURN_MAX = 64
"""Messages taken before other tasks of the loop get their turn."""
REPLIES_QUEUED_MAX = 1000
"""Per client; replies to one that does not read are dropped beyond it."""
REQUEST_ID_BYTES = 8

OnMessage = Callable[[bytes, bytes, bytes], None]
"""Client, request id, payload."""


class RouterSocket:
    """A bound ROUTER; malformed messages are dropped and counted."""

    def __init__(self, on_message: OnMessage, credentials: PoolCredentials | None = None) -> None:
        """With `credentials` only clients that have the same ones are heard."""
        self._on_message = on_message
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._gatekeeper = self._guard(credentials) if credentials is not None else None
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._reading = False
        self.dropped = 0

    @property
    def context(self) -> zmq.Context[zmq.Socket[bytes]]:
        """Ended by `close`; whoever makes sockets in it closes them before."""
        return self._context

    def _guard(self, credentials: PoolCredentials) -> ThreadAuthenticator:
        serve_members(self._socket, credentials)
        return gatekeeper(self._context, credentials)

    def bind(self, host: str, port: int) -> int:
        """Listen; the port (a free one for 0). Raises SetupError."""
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        self._socket.setsockopt(zmq.SNDHWM, REPLIES_QUEUED_MAX)
        self._socket.setsockopt(zmq.RCVHWM, REPLIES_QUEUED_MAX)
        bound = listen_on(self._socket, host, port, "meta.native_port")
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._loop.call_soon(self._read)
        return bound

    def send(self, client: bytes, request_id: bytes, payload: bytes) -> None:
        """Queue a reply; dropped if the client is gone or does not read."""
        if self._closed:
            return
        try:
            self._socket.send_multipart((client, request_id, payload), zmq.NOBLOCK)
        except zmq.ZMQError:
            self.dropped += 1
        if not self._reading:
            # Sending may take the edge that announces a message to read.
            self._loop.call_soon(self._read)

    def close(self) -> None:
        """Stop reading; queued replies get a moment to leave."""
        self._closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        if self._gatekeeper is not None:
            self._gatekeeper.stop()
        self._context.term()

    def _read(self) -> None:
        if self._closed:
            return
        self._reading = True
        try:
            for _ in range(READS_PER_TURN_MAX):
                try:
                    frames = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    return
                if len(frames) == 3 and len(frames[1]) == REQUEST_ID_BYTES:
                    self._on_message(*frames)
                else:
                    self.dropped += 1
        finally:
            self._reading = False
        self._loop.call_soon(self._read)
