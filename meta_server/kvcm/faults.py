"""DebugService: calls that fail on request, so that clients of the API can be tested against it. Off unless enabled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meta_server.kvcm.errors import FaultInjected
from meta_server.kvcm.protocol import debug_service_pb2 as debug
from stratakv.errors import InvalidRequest


@dataclass(slots=True)
class _Fault:
    calls_left: int
    """That still go well."""
    is_once: bool


class Faults:
    """What fails, by call; empty unless DebugService fills it."""

    def __init__(self) -> None:
        self._by_call: dict[str, _Fault] = {}

    def check(self, api_name: str) -> None:
        """Called once for every call. Raises FaultInjected."""
        if (fault := self._by_call.get(api_name)) is None:
            return
        if fault.calls_left:
            fault.calls_left -= 1
            return
        if fault.is_once:
            del self._by_call[api_name]
        raise FaultInjected(f"a fault was injected into {api_name}")

    def inject(self, api_name: str, *, at_call: int, is_once: bool) -> None:
        """Takes the place of the call's fault before. The next call is number 1."""
        self._by_call[api_name] = _Fault(at_call - 1, is_once)

    def remove(self, api_name: str) -> bool:
        """Whether there was one."""
        return self._by_call.pop(api_name, None) is not None

    def clear(self) -> None:
        self._by_call.clear()


class DebugService:
    """The calls; every meta server answers them for itself."""

    def __init__(self, faults: Faults, api_names: Iterable[str]) -> None:
        """`api_names` can fail."""
        self._faults = faults
        self._api_names = frozenset(api_names)

    async def inject_fault(self, request: debug.InjectFaultRequest) -> debug.CommonResponse:
        self._check(request.api_name)
        if request.fault_type != debug.FT_INTERNAL_ERROR:
            raise InvalidRequest(f"there is no fault type {request.fault_type}", param="fault_type")
        if request.fault_trigger_strategy not in (debug.ALWAYS, debug.ONCE):
            raise InvalidRequest(
                f"there is no strategy {request.fault_trigger_strategy}", param="fault_trigger_strategy"
            )
        if request.trigger_at_call < 0:
            raise InvalidRequest("trigger_at_call is negative", param="trigger_at_call")
        is_once = request.fault_trigger_strategy == debug.ONCE
        self._faults.inject(request.api_name, at_call=request.trigger_at_call or 1, is_once=is_once)
        return debug.CommonResponse()

    async def remove_fault(self, request: debug.RemoveFaultRequest) -> debug.CommonResponse:
        self._check(request.api_name)
        if not self._faults.remove(request.api_name):
            raise InvalidRequest(f"{request.api_name} has no fault", param="api_name")
        return debug.CommonResponse()

    async def clear_faults(self, _: debug.ClearFaultsRequest) -> debug.CommonResponse:
        self._faults.clear()
        return debug.CommonResponse()

    def _check(self, api_name: str) -> None:
        if api_name not in self._api_names:
            raise InvalidRequest(f"there is no call {api_name!r}; names are as in the protocol files", param="api_name")
