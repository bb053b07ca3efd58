"""Follows what the meta server's pool holds, for as long as its task runs.

    follower = PoolFollower(client)
    task = asyncio.create_task(follower.run())
    ...
    node = follower.view.node_of.get((namespace, key))

Events are heard on a SUB socket, snapshots asked for through the client. When events are lost, or the meta server is another,
`view.is_whole` is False until the next snapshot is in.
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.asyncio

from stratakv.errors import StrataError
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.member_sockets import as_member
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.pool_view import EVENTS_HELD_MAX, PoolView
from stratakv.wire import MESSAGE_BYTES_MAX, PROTOCOL_VERSION, EventSnapshot, GetEventSnapshot, Hello, Welcome
from stratakv.wire_events import decode_event

SILENCE_S_MAX = 3.0
"""The meta server says at least once a second that it lives; after so long it is asked where its events are."""
RETRY_S = 1.0
_log = EventLogger("stratakv.follower")


class PoolFollower:
    """Keeps `view` up to date; one event loop owns it."""

    def __init__(self, client: MetaClient, credentials: PoolCredentials | None = None) -> None:
        self.view = PoolView()
        self._client = client
        self._credentials = credentials
        self._endpoint = ""
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            while True:
                try:
                    await self._step()
                except StrataError as error:
                    _log.debug("events_out_of_reach", error=error.message)
                    self.view.unanswered()
                    await asyncio.sleep(RETRY_S)
        finally:
            self._close()
            self._context.term()

    async def _step(self) -> None:
        socket = self._socket or await self._connect()
        if (after := self.view.ask()) is not None:
            self.view.take_part(await self._client.call(GetEventSnapshot(after), EventSnapshot))
        try:
            payload = await asyncio.wait_for(socket.recv(), SILENCE_S_MAX)
        except TimeoutError:
            await self._connect()
            return
        try:
            self.view.take_event(decode_event(payload))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StrataError(f"an event cannot be read: {error}") from None

    async def _connect(self) -> zmq.asyncio.Socket:
        """To where the meta server publishes now."""
        welcome = await self._client.call(Hello(PROTOCOL_VERSION, "follower", ""), Welcome)
        host = urlsplit(self._client.endpoint).hostname
        endpoint = f"tcp://{f'[{host}]' if host and ':' in host else host}:{welcome.events_port}"
        if self._socket is None or endpoint != self._endpoint:
            self._close()
            self._endpoint, self._socket = endpoint, self._open()
            self._socket.connect(endpoint)
        return self._socket

    def _open(self) -> zmq.asyncio.Socket:
        socket = self._context.socket(zmq.SUB)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RCVHWM, EVENTS_HELD_MAX),
            (zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX),
            (zmq.IPV6, int("[" in self._endpoint)),
        ):
            socket.setsockopt(option, value)
        if self._credentials is not None:
            as_member(socket, self._credentials)
        socket.subscribe(b"")
        return socket

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
