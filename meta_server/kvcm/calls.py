"""Every call of a service by name, the same for both transports: runs it, measures it, turns errors into the header."""

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
from meta_server.kvcm.metrics import Metrics
from stratakv.errors import Overloaded, StrataError
from stratakv.log import EventLogger

CALLS_MAX = 2048
"""At once, over all services."""
Handler = Callable[[Any], Awaitable[Message]]
_log = EventLogger("meta_server.kvcm")


@dataclass(frozen=True, slots=True)
class Call:
    """One call: its wire types, and what it does (None: it is not supported)."""

    name: str
    request: type[Message]
    response: type[Message]
    handler: Handler | None

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
    """The calls of one service; a handler is the method of the same name in snake_case, if there is one."""

    def __init__(self, service: ServiceDescriptor, implementation: object, metrics: Metrics, gate: Gate) -> None:
        self.service_name = str(service.full_name)
        self._metrics = metrics
        self._gate = gate
        self.by_name: dict[str, Call] = {}
        for method in service.methods:
            handler = getattr(implementation, re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower(), None)
            classes = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
            self.by_name[method.name] = Call(method.name, *classes, handler)
        self.by_http_name = {call.http_name: call for call in self.by_name.values()}

    async def run(self, call: Call, request: Message) -> Any:
        """The response, its header filled; errors of any kind are told in it."""
        began = time.perf_counter()
        response: Any
        try:
            with self._gate:
                if call.handler is None:
                    raise NotSupported(f"{call.name} is not supported by this meta server")
                response = await call.handler(request)
            code, message = "OK", ""
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


def set_header(response: Any, code: str, message: str) -> None:
    """Fill a response's header."""
    status = response.header.status
    status.code = type(status).DESCRIPTOR.fields_by_name["code"].enum_type.values_by_name[code].number
    status.message = message
    response.header.request_id = uuid.uuid4().hex
