"""A stream that nobody reads loses what does not fit into its queue, and ends with the leader's term."""

from __future__ import annotations

import asyncio

import pytest

from meta_server.kvcm import event_streams
from meta_server.kvcm.event_streams import EventStreams
from meta_server.kvcm.protocol import event_service_pb2 as events
from stratakv.errors import Overloaded
from stratakv.pool.meta_errors import NotLeader
from tests.pool_world import World

QUEUED = 3


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> EventStreams:
    monkeypatch.setattr(event_streams, "EVENTS_QUEUED_MAX", QUEUED)
    monkeypatch.setattr(event_streams, "STREAMS_MAX", 1)
    return EventStreams()


async def heard(streams: EventStreams, world: World) -> list[events.PoolEvent]:
    """What one hears that reads nothing while ten events pass and the term ends."""
    stream = streams.subscribe()
    first = await anext(stream)
    assert first.kind == events.ALIVE
    with pytest.raises(Overloaded):
        streams.subscribe()
    node = next(iter(world.handlers.nodes))
    for kind in [events.NODE_DOWN, events.NODE_UP] * 5:
        world.handlers.events.node(kind, node)
    streams.stand_by()
    with pytest.raises(NotLeader):
        streams.subscribe()
    return [event async for event in stream]


def test_a_stream_that_nobody_reads_has_a_gap_and_ends(streams: EventStreams) -> None:
    world = World()
    world.start_daemon("a", 8)
    streams.lead(world.handlers)
    before = world.handlers.events.sequence
    told = asyncio.run(heard(streams, world))
    sequences = [event.sequence - before for event in told]
    assert sequences == [2, 3], "the first made room for the end, the others did not fit"
    streams.lead(world.handlers)
    assert asyncio.run(_first(streams)).sequence == before + 10, "its place is free again"
    world.close()


async def _first(streams: EventStreams) -> events.PoolEvent:
    return await anext(streams.subscribe())
