"""Events of the pool for clients of the KVCM ports: streams over gRPC and HTTP, and the snapshot's parts as a call.

A stream's queue is bounded: what finds it full is lost for that stream, which sees it by the numbers. Streams end with the term
of the leader that they heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from meta_server.handlers import Handlers
from meta_server.kvcm.protocol import event_service_pb2 as events
from stratakv.errors import Overloaded
from stratakv.pool.meta_errors import NotLeader
from stratakv.wire import GetEventSnapshot
from stratakv.wire_events import PoolEvent

EVENTS_QUEUED_MAX = 1000
"""Per stream, of up to 32 KiB each."""
STREAMS_MAX = 64


class EventStreams:
    """The streams that are open."""

    def __init__(self) -> None:
        self._handlers: Handlers | None = None
        self._open: set[asyncio.Queue[PoolEvent | None]] = set()

    def lead(self, handlers: Handlers) -> None:
        """What changes from now on is told."""
        self._handlers = handlers

    def stand_by(self) -> None:
        """End all streams. Safe to repeat."""
        self._handlers = None
        for queue in self._open:
            # Room for the end, whatever else is lost.
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    def subscribe(self) -> AsyncIterator[events.PoolEvent]:
        """What changes from now on. Raises NotLeader, Overloaded."""
        if self._handlers is None:
            raise NotLeader("this meta server does not lead")
        if len(self._open) >= STREAMS_MAX:
            raise Overloaded(f"{STREAMS_MAX} streams of events are open already")
        return self._stream(self._handlers)

    async def _stream(self, handlers: Handlers) -> AsyncIterator[events.PoolEvent]:
        queue: asyncio.Queue[PoolEvent | None] = asyncio.Queue(EVENTS_QUEUED_MAX)

        def publish(event: PoolEvent) -> None:
            if not queue.full():
                queue.put_nowait(event)

        unsubscribe = handlers.events.subscribe(publish)
        self._open.add(queue)
        try:
            handlers.events.tell_alive(publish)
            while (event := await queue.get()) is not None:
                yield events.PoolEvent(
                    epoch=event.epoch,
                    sequence=event.sequence,
                    kind=int(event.kind),  # type: ignore[arg-type]
                    node=event.node,
                    medium=event.medium,
                    namespace=event.namespace,
                    keys=event.keys,
                )
        finally:
            unsubscribe()
            self._open.discard(queue)


class EventCalls:
    """EventService, but for its stream."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers

    async def get_event_snapshot(self, request: events.GetEventSnapshotRequest) -> events.GetEventSnapshotResponse:
        part = self._handlers.event_snapshot(GetEventSnapshot(request.after))
        return events.GetEventSnapshotResponse(
            epoch=part.epoch,
            sequence=part.sequence,
            nodes=[events.NodeMark(node=m.node, medium=m.medium, is_up=m.is_up) for m in part.nodes],
            blocks=[events.BlockGroup(namespace=g.namespace, node=g.node, keys=g.keys) for g in part.blocks],
            next=part.next,
        )
