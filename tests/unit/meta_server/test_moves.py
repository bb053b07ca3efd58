"""Pages that change their place between a daemon's memory and its disk."""

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
    world.start_disk("a", pages=PAGES)
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


def test_bytes_that_a_disk_told_of_before_their_pages_are_counted_once(world: World) -> None:
    keys = put(world, 16)
    memory, disk = world.daemons["a"], world.daemons["a/disk"]
    world.tick(1.0)
    memory.copy_to(disk)
    assert disk.used_bytes > 0.5 * disk.segment.size_bytes, "twice that would be too much"
    world.heartbeat(disk)
    world.report_moves(memory)
    world.tick(1.0, silent="a/disk")
    assert world.call(wire.MatchPrefix(NAMESPACE, b"".join(keys)), wire.Match).num_blocks == len(keys)
