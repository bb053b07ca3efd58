"""One DEALER socket to one meta server: requests out, replies back to those who wait for them. Used by `MetaClient`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import msgspec
import zmq

from stratakv.errors import StrataError, Unavailable
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.member_sockets import as_member
from stratakv.pool.meta_errors import ERRORS_BY_CODE, NotLeader
from stratakv.wire import MESSAGE_BYTES_MAX, Failure, Message, ReplyT, Welcome, decode_reply, encode

CALLS_MAX = 4096
"""Calls in progress at once."""
REQUEST_ID_BYTES = 8
_SENDS_QUEUED_MAX = 1000


class NoAnswer(Unavailable):
    """Silence, in contrast to an Unavailable that the server itself reports."""


class Elsewhere(NotLeader):
    """The server says that another one leads."""

    def __init__(self, message: str, leader: str) -> None:
        super().__init__(message)
        self.leader = leader
        """host:port, or empty."""


class MetaLink:
    """A connection that is closed rather than mended: what it holds for a dead server must not reach its successor late."""

    def __init__(self, endpoint: str, credentials: PoolCredentials | None) -> None:
        self.endpoint = endpoint
        self.welcome: Welcome | None = None
        """What the server said when it was greeted."""
        self._calls: dict[bytes, asyncio.Future[Message]] = {}
        self._ids = itertools.count(1)
        # Shared and never ended: ending one that still has a socket would wait for ever.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket: zmq.Socket[bytes] | None = context.socket(zmq.DEALER)
        options: Sequence[tuple[int, int]] = (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX),
            (zmq.SNDHWM, _SENDS_QUEUED_MAX),
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 1000),
        )
        for option, value in options:
            self._socket.setsockopt(option, value)
        if credentials is not None:
            as_member(self._socket, credentials)
        self._socket.connect(endpoint)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read)

    async def exchange(self, request: Message, reply_type: type[ReplyT], timeout_s: float) -> ReplyT:
        """One request and its reply. Raises NoAnswer, Elsewhere, or what the server said."""
        payload = encode(request)
        if len(payload) > MESSAGE_BYTES_MAX:
            raise StrataError(f"a request of {len(payload)} bytes is longer than {MESSAGE_BYTES_MAX}")
        if len(self._calls) >= CALLS_MAX:
            raise Unavailable(f"{CALLS_MAX} calls to the meta server are in progress already")
        request_id = next(self._ids).to_bytes(REQUEST_ID_BYTES, "big")
        call: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._calls[request_id] = call
        try:
            self._send((request_id, payload))
            async with asyncio.timeout(timeout_s):
                reply = await call
        except TimeoutError:
            raise NoAnswer(f"the meta server at {self.endpoint} did not answer within {timeout_s:g} s") from None
        finally:
            del self._calls[request_id]
        if isinstance(reply, Failure):
            raise _error_of(reply)
        if not isinstance(reply, reply_type):
            raise StrataError(f"the meta server answered {type(request).__name__} with {type(reply).__name__}")
        return reply

    def close(self, reason: str) -> None:
        """Disconnect; what is in progress fails. Safe to repeat."""
        if self._socket is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None
        for call in self._calls.values():
            if not call.done():
                call.set_exception(NoAnswer(reason))

    def _send(self, frames: tuple[bytes, bytes]) -> None:
        if self._socket is None:
            raise NoAnswer("the connection is closed")
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            raise NoAnswer(f"the meta server at {self.endpoint} takes no requests") from None
        # Sending may take the edge that announces a message to read.
        asyncio.get_running_loop().call_soon(self._read)

    def _read(self) -> None:
        while self._socket is not None:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            call = self._calls.get(frames[0]) if len(frames) == 2 else None
            if call is None or call.done():
                continue  # the answer to a call that was given up
            try:
                call.set_result(decode_reply(frames[1]))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                call.set_exception(StrataError(f"the meta server's answer cannot be read: {error}"))


def _error_of(failure: Failure) -> StrataError:
    kind = ERRORS_BY_CODE.get(failure.code, StrataError)
    return Elsewhere(failure.message, failure.leader) if kind is NotLeader else kind(failure.message)
