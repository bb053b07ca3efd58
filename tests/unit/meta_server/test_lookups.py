"""Lookups of blocks that are no prefix of each other."""

from __future__ import annotations

import os

import pytest

from stratakv import wire
from stratakv.errors import InvalidRequest
from tests.pool_world import NAMESPACE, PAGE_BYTES, World


def test_blocks_are_found_each_by_itself_and_in_their_namespace_only() -> None:
    world = World()
    daemon = world.start_daemon("a", pages=8)
    keys = [os.urandom(32) for _ in range(5)]
    put_id = os.urandom(16)
    world.call(wire.PutStart(put_id, NAMESPACE, keys[1] + keys[3], PAGE_BYTES, 16), wire.PutGrant)
    assert _missing(world, keys) == [0, 1, 2, 3, 4]
    world.call(wire.PutEnd(put_id, daemon.segment.epoch, daemon.allocate(put_id, 2)), wire.Done)
    assert _missing(world, keys) == [0, 2, 4]
    assert _missing(world, keys, b"o" * 16) == [0, 1, 2, 3, 4]
    with pytest.raises(InvalidRequest):
        world.call(wire.FindBlocks(NAMESPACE, b"short"), wire.FoundBlocks)
    world.close()


def _missing(world: World, keys: list[bytes], namespace: bytes = NAMESPACE) -> list[int]:
    return world.call(wire.FindBlocks(namespace, b"".join(keys)), wire.FoundBlocks).missing
