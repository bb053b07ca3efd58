"""Client of the meta server: many calls at once over one DEALER socket, each with its own deadline.

    client = MetaClient(settings.meta, role="worker", name="decode-0")
    match = await client.call(MatchPrefix(namespace, keys, lease_s=5.0), Match)

A call that gets no answer in time costs its caller that time once: from then on `available` is False and calls fail at
once, while a background task greets the server every second until it answers. One event loop owns a client.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import msgspec
import zmq

from stratakv.errors import StrataError, Unavailable
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.meta_errors import ERRORS_BY_CODE, ProtocolMismatch
from stratakv.settings import MetaSettings
from stratakv.wire import (
    MESSAGE_BYTES_MAX,
    PROTOCOL_VERSION,
    Failure,
    Hello,
    Message,
    ReplyT,
    Welcome,
    decode_reply,
    encode,
)

CALLS_MAX = 4096
"""Calls in progress at once."""
PROBE_S = 1.0
"""How often a server that does not answer is greeted."""
REQUEST_ID_BYTES = 8
_SENDS_QUEUED_MAX = 1000
_log = EventLogger("stratakv.meta_client")


class MetaClient:
    """Connects, and reconnects, by itself."""

    def __init__(
        self,
        server: MetaSettings | str,
        *,
        role: str = "client",
        name: str = "",
        credentials: PoolCredentials | None = None,
    ) -> None:
        """`server` is an endpoint (tcp://host:port) or the settings that name it.

        With `credentials` only a server that has the same ones is spoken to; one that has others never answers.
        """
        settings = MetaSettings() if isinstance(server, str) else server
        self.endpoint = server if isinstance(server, str) else f"tcp://{settings.host}:{settings.native_port}"
        self._timeout_s = settings.request_timeout_s
        self._hello = Hello(protocol=PROTOCOL_VERSION, role=role, name=name)
        self._credentials = credentials
        self._calls: dict[bytes, asyncio.Future[Message]] = {}
        self._ids = itertools.count(1)
        # Shared and never ended: ending one that still has a socket would wait for ever.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket: zmq.Socket[bytes] | None = None
        self._probe: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._closed = False
        self.available = False
        """False from a call that timed out (or before the first greeting) until the server answers again."""
        self.welcome: Welcome | None = None
        """What the server said of itself last; a new `epoch` means that it was started anew."""
        self.mismatch: ProtocolMismatch | None = None
        """Set while the server refuses this client's protocol version."""

    async def __aenter__(self) -> MetaClient:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> bool:
        """Connect and greet; whether the server answered (if not, it is greeted on). The first call does so by itself.

        Raises ProtocolMismatch.
        """
        async with self._starting:
            if self._socket is None and not self._closed:
                self._open()
                try:
                    await self._greet()
                except (Unavailable, ProtocolMismatch):
                    self._lost()
        if self.mismatch is not None:
            raise self.mismatch
        return self.available

    async def close(self) -> None:
        """Fail what is in progress, and disconnect."""
        self._closed = True
        self.available = False
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(Unavailable("the client was closed"))
        self._close_socket()

    async def call(self, request: Message, reply_type: type[ReplyT], timeout_s: float | None = None) -> ReplyT:
        """Send one request; its reply.

        Waits at most `timeout_s`, and never longer than `meta.request_timeout_s`. Raises Unavailable if no answer came (what
        was asked may have been done), else what the server said: the classes of `stratakv.pool.meta_errors` and
        `stratakv.errors`.
        """
        if self.welcome is None and self._probe is None:
            await self.start()
        if not self.available:
            raise self.mismatch or Unavailable(
                f"the meta server at {self.endpoint} does not answer", hint="If it runs, compare pool.secret of both."
            )
        limit_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        try:
            return await self._exchange(request, reply_type, limit_s)
        except _NoAnswer:
            self._lost()
            raise

    async def _exchange(self, request: Message, reply_type: type[ReplyT], timeout_s: float) -> ReplyT:
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
            raise _NoAnswer(f"the meta server at {self.endpoint} did not answer within {timeout_s:g} s") from None
        finally:
            del self._calls[request_id]
        if isinstance(reply, Failure):
            raise ERRORS_BY_CODE.get(reply.code, StrataError)(reply.message)
        if not isinstance(reply, reply_type):
            raise StrataError(f"the meta server answered {type(request).__name__} with {type(reply).__name__}")
        return reply

    async def _greet(self) -> None:
        try:
            self.welcome = await self._exchange(self._hello, Welcome, min(PROBE_S, self._timeout_s))
        except ProtocolMismatch as error:
            self.mismatch = error
            raise
        self.mismatch = None
        self.available = True

    def _lost(self) -> None:
        if self.available:
            _log.warning("meta_server_lost", endpoint=self.endpoint)
        self.available = False
        if self._probe is None or self._probe.done():
            self._probe = asyncio.get_running_loop().create_task(self._greet_until_answered())

    async def _greet_until_answered(self) -> None:
        while not self.available:
            began = asyncio.get_running_loop().time()
            try:
                await self._greet()
            except (Unavailable, ProtocolMismatch) as error:
                _log.debug("meta_server_silent", endpoint=self.endpoint, error=error.message)
                # A new socket: what the old one still holds for a dead server must not reach its successor late.
                self._open()
                await asyncio.sleep(max(0.0, began + PROBE_S - asyncio.get_running_loop().time()))
        _log.info("meta_server_back", endpoint=self.endpoint)

    def _open(self) -> None:
        self._close_socket()
        self._socket = self._context.socket(zmq.DEALER)
        options: Sequence[tuple[int, int]] = (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX),
            (zmq.SNDHWM, _SENDS_QUEUED_MAX),
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 1000),
        )
        for option, value in options:
            self._socket.setsockopt(option, value)
        if self._credentials is not None:
            keys = self._credentials.curve_keys("client")
            self._socket.curve_publickey, self._socket.curve_secretkey = keys.public, keys.secret
            self._socket.curve_serverkey = self._credentials.curve_keys("server").public
        self._socket.connect(self.endpoint)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._read)

    def _close_socket(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _send(self, frames: tuple[bytes, bytes]) -> None:
        if self._socket is None:
            raise Unavailable("the client is closed")
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            raise _NoAnswer(f"the meta server at {self.endpoint} takes no requests") from None
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


class _NoAnswer(Unavailable):
    """Silence, in contrast to an Unavailable that the server itself reports."""
