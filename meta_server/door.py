"""The native protocol's door: takes requests off the socket, has the leader's handlers answer, turns others away.

A meta server that stands by has no handlers: it greets, says who leads, and refuses the rest. Owned by `meta_server.server`.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

import msgspec

from meta_server.call_times import CallTimes
from meta_server.elector import Elector
from meta_server.errors import failure_of
from meta_server.event_socket import EventSocket
from meta_server.handlers import Handlers
from meta_server.router_socket import RouterSocket
from meta_server.validate import check_protocol
from stratakv import wire
from stratakv.errors import InvalidRequest, Overloaded, StrataError
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.meta_errors import NotLeader
from stratakv.settings import MetaSettings
from stratakv.version import version

REQUESTS_WAITING_MAX = 20_000
"""Requests that wait for PostgreSQL at once."""
MALFORMED = "malformed"
"""Stands for the name of a call that cannot be read."""
_log = EventLogger("meta_server")
Reply = Callable[[wire.Message], None]


class Door:
    """One socket for requests and one for events, for as long as the process runs."""

    def __init__(self, settings: MetaSettings, credentials: PoolCredentials | None) -> None:
        """Raises SetupError. Requests wait at the socket until `open`."""
        self._socket = RouterSocket(self._on_message, credentials)
        self._events = EventSocket(self._socket.context, credentials)
        self.port = self._socket.bind(settings.host, settings.native_port)
        self.call_times = CallTimes(
            "stratakv_meta_call_seconds", "call", slow_s=settings.slow_call_s, clock=time.monotonic
        )
        self._events_port = self._events.bind(settings.host, settings.events_port)
        self._handlers: Handlers | None = None
        self._elector: Elector | None = None
        self._waiting: set[asyncio.Task[None]] = set()

    def open(self, elector: Elector) -> None:
        """Answer from now on, as one that stands by."""
        self._elector = elector

    def lead(self, handlers: Handlers) -> None:
        """Answer everything, and publish what changes."""
        self._handlers = handlers
        handlers.events_port = self._events_port
        handlers.events.subscribe(self._events.publish)

    def stand_by(self) -> None:
        """Turn requests away; those that wait for PostgreSQL are for the next leader to answer."""
        self._handlers = None
        for task in self._waiting:
            task.cancel()

    async def answered(self) -> None:
        """Return once nothing waits any more."""
        while self._waiting:
            await asyncio.wait(self._waiting)

    def close(self) -> None:
        self._events.close()
        self._socket.close()

    def _on_message(self, client: bytes, request_id: bytes, payload: bytes) -> None:
        elector = self._elector
        if elector is None:
            return

        began, name = time.perf_counter(), MALFORMED

        def reply(message: wire.Message) -> None:
            self._socket.send(client, request_id, wire.encode(message))
            self.call_times.observe(name, time.perf_counter() - began)

        try:
            request = _decode(payload)
            name = type(request).__name__
            answer = self._answer(request, elector)
            if inspect.isawaitable(answer):
                self._answer_later(answer, reply)
            else:
                reply(answer)
        except StrataError as error:
            reply(failure_of(error, self._other_leader()))
        except Exception:
            _log.exception("request_failed")
            reply(failure_of(StrataError("internal error")))

    def _answer(self, request: wire.Message, elector: Elector) -> wire.Message | Awaitable[wire.Message]:
        handlers = self._handlers if elector.may_answer else None
        if isinstance(request, wire.GetLeader):
            return self._leader_state(elector)
        if isinstance(request, wire.DemoteLeader) and handlers is not None:
            return self._demote(elector)
        if isinstance(request, wire.Hello) and handlers is None:
            check_protocol(request)
            return wire.Welcome(wire.PROTOCOL_VERSION, version(), b"", is_leader=False, leader=self._other_leader())
        if handlers is None:
            raise NotLeader(f"the meta server at {elector.server.address} does not lead")
        return handlers.by_message[type(request)](request)

    def _leader_state(self, elector: Elector) -> wire.LeaderState:
        is_leader = self._handlers is not None and elector.may_answer
        return wire.LeaderState(
            server=elector.server.address,
            is_leader=is_leader,
            leader=elector.server.address if is_leader else self._other_leader(),
            term=elector.term if is_leader else 0,
            lease_left_s=elector.lease_left_s,
            standbys=elector.standbys if is_leader else [],
            take_overs=elector.take_overs,
        )

    async def _demote(self, elector: Elector) -> wire.Done:
        await elector.demote()
        return wire.Done()

    def _other_leader(self) -> str:
        if self._elector is None or self._elector.leader.address == self._elector.server.address:
            return ""
        return self._elector.leader.address

    def _answer_later(self, answer: Awaitable[wire.Message], reply: Reply) -> None:
        if len(self._waiting) >= REQUESTS_WAITING_MAX:
            if inspect.iscoroutine(answer):
                answer.close()
            raise Overloaded("too many requests wait for the metadata database")
        task = asyncio.get_running_loop().create_task(self._reply_when_done(answer, reply))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _reply_when_done(self, answer: Awaitable[wire.Message], reply: Reply) -> None:
        try:
            reply(await answer)
        except StrataError as error:
            reply(failure_of(error, self._other_leader()))
        except asyncio.CancelledError:
            reply(failure_of(NotLeader("this meta server has ceased to lead"), self._other_leader()))
            raise
        except Exception:
            _log.exception("request_failed")
            reply(failure_of(StrataError("internal error")))


def _decode(payload: bytes) -> wire.Message:
    try:
        request: wire.Message = wire.decode_request(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"malformed request: {error}") from None
    return request
