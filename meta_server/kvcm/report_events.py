"""ReportEvent: takes the events of one host, one after another, and tells of each whether it was taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from meta_server.kvcm.entities import Instance, check_name
from meta_server.kvcm.errors import NodeNotRegistered, SnapshotRateLimited, SnapshotRequired, code_of
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.reported import InstanceReports, Reports, Specs
from meta_server.validate import INT64_MAX, KEYS_MAX
from stratakv.errors import InvalidRequest, StrataError

EVENTS_PER_TURN = 500
"""Taken before other calls get their turn."""
_OK = meta.OK
_UNKNOWN_MAY_SEND = (meta.EVENT_NODE_REGISTER, meta.EVENT_HOST_DOWN)


async def report(reports: Reports, instance: Instance, request: meta.ReportEventRequest) -> meta.ReportEventResponse:
    """The header tells of an error only if nothing was taken. Raises InvalidRequest."""
    check_name("host_ip_port", request.host_ip_port)
    if not 0 < len(request.events) <= KEYS_MAX:
        raise InvalidRequest(f"expected 1 to {KEYS_MAX} events", param="events")
    batch = _Batch(reports.of(instance.id, wholes(instance)), request.host_ip_port, reports.now())
    for number, event in enumerate(request.events, 1):
        batch.take(event)
        if number % EVENTS_PER_TURN == 0:
            await asyncio.sleep(0)
    return batch.response()


def wholes(instance: Instance) -> list[Specs]:
    """A block is found where all of its specs are, or those of a group."""
    every = Specs(spec.name for spec in instance.config.location_spec_infos)
    return [every, *(Specs(group.spec_names) for group in instance.config.location_spec_groups)]


class _Batch:
    """The events of one request."""

    def __init__(self, reports: InstanceReports, host: str, now: float) -> None:
        self._reports = reports
        self._host = host
        self._now = now
        self._answer = meta.ReportEventResponse()
        self._results: list[int] = []
        self._first: StrataError | None = None
        self._takers: dict[int, Callable[[Any], None]] = {
            meta.EVENT_NODE_REGISTER: self._register,
            meta.EVENT_BLOCK_ADD: self._add,
            meta.EVENT_BLOCK_DELETE: self._delete,
            meta.EVENT_HOST_DOWN: lambda _: reports.drop(host),
            meta.EVENT_HEARTBEAT: lambda _: None,
            meta.EVENT_BLOCK_SNAPSHOT: self._snapshot,
        }

    def take(self, event: meta.EventItem) -> None:
        """Errors are kept for the response."""
        try:
            kind = event.event_type
            taker = self._takers.get(kind)
            if taker is None:
                raise InvalidRequest(f"there is no event type {kind}", param="event_type")
            if kind not in _UNKNOWN_MAY_SEND:
                self._reports.heard(self._host, self._now)
            taker(event)
        except StrataError as error:
            self._first = self._first or error
            self._results.append(meta.ErrorCode.Value(code_of(error)))
            if isinstance(error, (NodeNotRegistered, SnapshotRequired)):
                self._answer.snapshot_required = True
            if isinstance(error, SnapshotRateLimited):
                self._answer.retry_after_ms = max(self._answer.retry_after_ms, error.retry_after_ms)
        else:
            self._results.append(_OK)

    def response(self) -> meta.ReportEventResponse:
        if self._first is not None and _OK in self._results:
            self._answer.item_results.extend(self._results)  # type: ignore[arg-type]
        elif self._first is not None:
            status = self._answer.header.status
            status.code, status.message = self._results[0], self._first.message  # type: ignore[assignment]
        return self._answer

    def _register(self, _: meta.EventItem) -> None:
        self._reports.register(self._host, self._now)

    def _add(self, event: meta.EventItem) -> None:
        block = event.block_add
        self._reports.add(self._host, block.medium, _key(block.block_key), Specs(spec.name for spec in block.specs))

    def _delete(self, event: meta.EventItem) -> None:
        block = event.block_delete
        self._reports.delete(self._host, block.medium, _key(block.block_key), Specs(block.spec_names))

    def _snapshot(self, event: meta.EventItem) -> None:
        whole = event.block_snapshot
        if len(whole.blocks) > KEYS_MAX:
            raise InvalidRequest(f"at most {KEYS_MAX} blocks in one snapshot", param="blocks")
        blocks = [
            (block.medium or whole.medium, _key(block.block_key), Specs(spec.name for spec in block.specs))
            for block in whole.blocks
        ]
        if whole.medium and any(medium != whole.medium for medium, _, _ in blocks):
            raise InvalidRequest("a block of the snapshot is of another medium", param="medium")
        self._answer.committed_snapshot_version = self._reports.snapshot(self._host, whole.medium, blocks, self._now)


def _key(text: str) -> int:
    try:
        key = int(text)
    except ValueError:
        key = INT64_MAX + 1
    if not -INT64_MAX - 1 <= key <= INT64_MAX:
        raise InvalidRequest(f"block_key must be a 64-bit number, got {text[:32]!r}", param="block_key")
    return key
