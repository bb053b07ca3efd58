"""What a waiting request will need comes back from disk before it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from stratakv import wire
from tests.pool_world import NAMESPACE, PAGE_BYTES, World

PAGES = 20


@pytest.fixture
def world() -> Iterator[World]:
    world = World(reclaim_high=0.95, reclaim_low=0.9, demote_high=0.5, demote_low=0.2)
    world.start_daemon("a", pages=PAGES)
    yield world
    world.close()


def put(world: World, count: int) -> list[bytes]:
    put_id, keys = os.urandom(16), [os.urandom(32) for _ in range(count)]
    grant = world.call(wire.PutStart(put_id, NAMESPACE, b"".join(keys), PAGE_BYTES, 16), wire.PutGrant)
    assert grant.segment is not None
    daemon = world.daemons[grant.segment.node]
    extents = daemon.allocate(put_id, count)
    daemon.keys.update(zip(extents, keys, strict=True))
    world.call(wire.PutEnd(put_id, grant.segment.epoch, extents), wire.Done)
    return keys


def settle(world: World) -> None:
    for _ in range(3):
        world.tick(1.0)
        world.carry_out_moves()


def test_pages_on_disk_come_back_before_anybody_has_read_them(world: World) -> None:
    world.start_disk("a", pages=PAGES)
    keys = put(world, 8)
    put(world, 6)
    settle(world)
    assert world.stats().demoted >= 8
    world.call(wire.FetchAhead(NAMESPACE, b"".join(keys[:5])), wire.Done)
    settle(world)
    assert world.stats().promoted == 5


def test_no_more_comes_back_than_there_is_room_for(world: World) -> None:
    world.start_disk("a", pages=PAGES)
    batches = [put(world, 8)]
    settle(world)
    batches.append(put(world, 8))
    settle(world)
    keys = [key for batch in batches for key in batch]
    for key in keys:
        world.call(wire.FetchAhead(NAMESPACE, key), wire.Done)
    settle(world)
    used = world.daemons["a"].used_bytes
    assert 0.4 * PAGES * PAGE_BYTES <= used <= 0.5 * PAGES * PAGE_BYTES


def test_what_is_in_memory_or_nowhere_is_left_alone(world: World) -> None:
    keys = put(world, 3)
    world.call(wire.FetchAhead(NAMESPACE, b"".join([*keys, os.urandom(32)])), wire.Done)
    world.call(wire.FetchAhead(NAMESPACE, os.urandom(32)), wire.Done)
    settle(world)
    assert world.stats().promoted == 0
