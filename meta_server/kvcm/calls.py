"""Every call of a service by name, the same for both transports: runs it, measures it, turns errors into the header.

Some calls every meta server answers (`cluster`); the others are the leader's, and are refused by who stands by.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from meta_server.kvcm.errors import NotSupported, code_of
from meta_server.kvcm.faults import Faults
from meta_server.kvcm.metrics import Metrics
from stratakv.errors import Overloaded, StrataError
from stratakv.log import EventLogger
from stratakv.pool.meta_errors import NotLeader

CALLS_MAX = 2048
"""At once, over all services."""
Handler = Callable[[Any], Awaitable[Message]]
_log = EventLogger("meta_server.kvcm")


@dataclass(frozen=True, slots=True)
class Call:
    """One call and its wire types."""

    name: str
    request: type[Message]
    response: type[Message]

    @property
    def http_name(self) -> str:
        return self.name[0].lower() + self.name[1:]


class Gate:
    """Bounds what is under way, in all services together."""

    def __init__(self) -> None:
        self._num_calls = 0

    def __enter__(self) -> None:
        if self._num_calls >= CALLS_MAX:
            raise Overloaded("too many calls are under way")
        self._num_calls += 1

    def __exit__(self, *_: object) -> None:
        self._num_calls -= 1


class Calls:
    """The calls of one service; what a call does is the method of the same name in snake_case, if there is one."""

    def __init__(
        self, service: ServiceDescriptor, cluster: object, metrics: Metrics, gate: Gate, faults: Faults
    ) -> None:
        """`cluster` has the calls that every meta server answers."""
        self.service_name = str(service.full_name)
        self._metrics = metrics
        self._gate = gate
        self._faults = faults
        self._refusal: Callable[[], NotLeader | None] = lambda: NotLeader("this meta server does not lead")
        self._leading: dict[str, Handler] = {}
        self.by_name: dict[str, Call] = {}
        for method in (method for method in service.methods if not method.server_streaming):
            self.by_name[method.name] = Call(
                method.name, GetMessageClass(method.input_type), GetMessageClass(method.output_type)
            )
        self.by_http_name = {call.http_name: call for call in self.by_name.values()}
        self._everywhere = self._handlers(cluster)

    def lead(self, implementation: object, refusal: Callable[[], NotLeader | None]) -> None:
        """Answer with the methods of `implementation`, unless `refusal` has an error."""
        self._leading, self._refusal = self._handlers(implementation), refusal

    def stand_by(self, refusal: Callable[[], NotLeader]) -> None:
        """Refuse what is the leader's to answer."""
        self._leading, self._refusal = {}, refusal

    async def run(self, call: Call, request: Message) -> Any:
        """The response, its header filled; errors of any kind are told in it."""
        began = time.perf_counter()
        response: Any
        try:
            with self._gate:
                self._faults.check(call.name)
                response = await self._handler(call)(request)
            code, message = _told(response)
        except StrataError as error:
            response = call.response()
            code, message = code_of(error), error.message
        except Exception:
            _log.exception("call_failed", call=call.name)
            response = call.response()
            code, message = "INTERNAL_ERROR", "internal error"
        set_header(response, code, message)
        self._metrics.count(call.name, code, time.perf_counter() - began)
        return response

    def _handler(self, call: Call) -> Handler:
        """Raises NotLeader, NotSupported."""
        if (handler := self._everywhere.get(call.name)) is not None:
            return handler
        if (refused := self._refusal()) is not None:
            raise refused
        if (handler := self._leading.get(call.name)) is None:
            raise NotSupported(f"{call.name} is not supported by this meta server")
        return handler

    def _handlers(self, implementation: object) -> dict[str, Handler]:
        named = {
            name: getattr(implementation, re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), None) for name in self.by_name
        }
        return {name: handler for name, handler in named.items() if handler is not None}


def _told(response: Any) -> tuple[str, str]:
    """What a handler says of itself, which has something to tell beside an error; else OK."""
    status = response.header.status
    if not status.code:
        return "OK", ""
    return type(status).DESCRIPTOR.fields_by_name["code"].enum_type.values_by_number[status.code].name, status.message


def set_header(response: Any, code: str, message: str) -> None:
    """Fill a response's header."""
    status = response.header.status
    status.code = type(status).DESCRIPTOR.fields_by_name["code"].enum_type.values_by_name[code].number
    status.message = message
    response.header.request_id = uuid.uuid4().hex
