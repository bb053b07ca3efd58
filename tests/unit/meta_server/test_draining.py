"""Draining a daemon: what is worth keeping is found elsewhere afterwards, as warm and as pinned as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from stratakv import wire
from stratakv.errors import InvalidRequest
from stratakv.pool.meta_errors import PoolFull, PutUnknown
from tests.pool_world import NAMESPACE, PAGE_BYTES, World

PAGES = 20


@pytest.fixture
def world() -> Iterator[World]:
    world = World(reclaim_high=0.9, reclaim_low=0.5, demote_high=1.0)
    for name in ("a", "b"):
        world.start_daemon(name, pages=PAGES)
    yield world
    world.close()


def put(world: World, count: int, node: str) -> list[bytes]:
    put_id, keys = os.urandom(16), [os.urandom(32) for _ in range(count)]
    request = wire.PutStart(put_id, NAMESPACE, b"".join(keys), PAGE_BYTES, 16, prefer_node=node)
    grant = world.call(request, wire.PutGrant)
    assert grant.segment is not None
    assert grant.segment.node == node
    daemon = world.daemons[node]
    extents = daemon.allocate(put_id, count)
    daemon.keys.update(zip(extents, keys, strict=True))
    world.call(wire.PutEnd(put_id, grant.segment.epoch, extents), wire.Done)
    return keys


def read(world: World, keys: list[bytes]) -> list[str]:
    """The nodes of those that are found, which counts as reading."""
    match = world.call(wire.MatchPrefix(NAMESPACE, b"".join(keys), 1.0), wire.Match)
    world.call(wire.ReleaseLease(match.lease_id), wire.Done)
    return [place.node for place in match.places()]


def copy_away(world: World, name: str) -> None:
    """The daemon carries out one heartbeat's orders."""
    source = world.daemons[name]
    world.heartbeat(source)
    if not source.moves_away:
        return
    put_id = os.urandom(16)
    keys, grant = world.start_copies(source, put_id)
    if grant.segment is None:
        return
    target = world.daemons[grant.segment.node]
    wanted = [keys[i] for i in grant.wanted]
    extents = target.allocate(put_id, len(wanted))
    target.keys.update(zip(extents, wanted, strict=True))
    world.call(wire.PutEnd(put_id, grant.segment.epoch, extents), wire.Done)


def test_read_pages_move_and_unread_ones_stay(world: World) -> None:
    hot, cold = put(world, 4, "a"), put(world, 4, "a")
    read(world, hot)
    before = world.drain("a", is_whole=False)
    assert (before.is_done, before.pages_left, before.bytes_left) == (False, 4, 4 * PAGE_BYTES)
    copy_away(world, "a")
    after = world.drain("a", is_whole=False)
    assert (after.is_done, after.pages_moved, after.pages_left) == (True, 4, 0)
    assert read(world, hot) == ["b"] * 4
    assert read(world, cold) == ["a"] * 4


def test_all_pages_move_if_asked_to(world: World) -> None:
    keys = put(world, 6, "a")
    world.drain("a")
    copy_away(world, "a")
    assert world.drain("a").is_done
    world.start_daemon("a", pages=PAGES)
    assert read(world, keys) == ["b"] * 6


def test_what_was_read_once_is_worth_keeping_on_its_next_daemon_too(world: World) -> None:
    keys = put(world, 3, "a")
    read(world, keys)
    world.drain("a", is_whole=False)
    copy_away(world, "a")
    assert world.drain("b", is_whole=False).pages_left == 3


def test_a_draining_daemon_gets_no_new_pages_until_that_is_undone(world: World) -> None:
    world.drain("a")
    request = wire.PutStart(os.urandom(16), NAMESPACE, os.urandom(32), PAGE_BYTES, 16, prefer_node="a")
    grant = world.call(request, wire.PutGrant)
    assert grant.segment is not None
    assert grant.segment.node == "b"
    world.drain("a", is_draining=False)
    put(world, 2, "a")


def test_pages_for_which_nobody_has_room_stay_and_the_drain_ends(world: World) -> None:
    put(world, 16, "b")
    keys = put(world, 6, "a")
    world.drain("a")
    for _ in range(3):
        copy_away(world, "a")
    progress = world.drain("a")
    assert (progress.is_done, progress.pages_moved, progress.pages_left) == (True, 2, 4)
    assert len(read(world, keys)) == 6


def test_pages_for_which_nobody_has_room_go_to_the_daemons_disk(world: World) -> None:
    disk = world.start_disk("a", pages=PAGES)
    put(world, 18, "b")
    keys = put(world, 6, "a")
    assert not world.drain("a").is_done
    for _ in range(2):
        world.heartbeat(world.daemons["a"])
        world.carry_out_moves()
    assert world.drain("a").is_done
    world.start_daemon("a", pages=PAGES)
    assert world.heartbeat(disk).moves_away == [], "its daemon's start ended the draining"
    assert read(world, keys) == ["a/disk"] * 6


def test_the_pages_of_its_disk_move_with_those_of_its_memory(world: World) -> None:
    disk = world.start_disk("a", pages=PAGES)
    put(world, 18, "b")
    keys = put(world, 6, "a")
    world.drain("a")
    for _ in range(2):
        world.heartbeat(world.daemons["a"])
        world.carry_out_moves()
    world.start_daemon("c", pages=PAGES)
    world.drain("a")
    copy_away(world, disk.segment.node)
    assert read(world, keys) == ["c"] * 6


def test_pins_move_with_their_pages(world: World) -> None:
    keys = put(world, 4, "a")
    pinned = world.call(wire.PinPrefix(NAMESPACE, b"".join(keys), 1e6), wire.Pinned)
    world.drain("a", is_whole=False)
    copy_away(world, "a")
    for _ in range(3):
        world.tick(1.0)
    assert world.daemons["a"].used_bytes == 0
    assert read(world, keys) == ["b"] * 4
    assert world.call(wire.Flush(), wire.Flushed).num_blocks == 0
    world.call(wire.Unpin(pinned.pin_id), wire.Done)
    assert world.call(wire.Flush(), wire.Flushed).num_blocks == 4


def test_a_page_that_was_flushed_while_it_was_copied_does_not_come_back(world: World) -> None:
    keys = put(world, 4, "a")
    world.drain("a")
    world.heartbeat(world.daemons["a"])
    put_id = os.urandom(16)
    _, grant = world.start_copies(world.daemons["a"], put_id)
    assert grant.segment is not None
    extents = world.daemons["b"].allocate(put_id, 4)
    assert world.call(wire.Flush(), wire.Flushed).num_blocks == 4
    world.call(wire.PutEnd(put_id, grant.segment.epoch, extents), wire.Done)
    assert read(world, keys) == []
    world.settle()
    assert [daemon.used_bytes for daemon in world.daemons.values()] == [0, 0]


def test_copies_of_a_daemon_that_died_meanwhile_are_found(world: World) -> None:
    keys = put(world, 4, "a")
    world.drain("a")
    world.heartbeat(world.daemons["a"])
    put_id = os.urandom(16)
    _, grant = world.start_copies(world.daemons["a"], put_id)
    assert grant.segment is not None
    extents = world.daemons["b"].allocate(put_id, 4)
    world.start_daemon("a", pages=PAGES)
    world.call(wire.PutEnd(put_id, grant.segment.epoch, extents), wire.Done)
    assert read(world, keys) == ["b"] * 4


def test_copies_that_are_never_finished_cost_only_room_for_a_while(world: World) -> None:
    keys = put(world, 4, "a")
    world.drain("a")
    world.heartbeat(world.daemons["a"])
    put_id = os.urandom(16)
    _, grant = world.start_copies(world.daemons["a"], put_id)
    assert grant.segment is not None
    extents = world.daemons["b"].allocate(put_id, 4)
    world.settle()
    assert world.daemons["b"].used_bytes == 0
    with pytest.raises(PutUnknown):
        world.call(wire.PutEnd(put_id, grant.segment.epoch, extents), wire.Done)
    assert read(world, keys) == ["a"] * 4
    copy_away(world, "a")
    assert read(world, keys) == ["b"] * 4


def test_with_no_other_daemon_nothing_moves(world: World) -> None:
    put(world, 3, "a")
    world.drain("b")
    progress = world.drain("a")
    assert (progress.is_done, progress.pages_left) == (True, 3)
    with pytest.raises(PoolFull):
        put(world, 1, "a")


def test_a_daemon_that_is_not_there_cannot_be_drained(world: World) -> None:
    with pytest.raises(InvalidRequest):
        world.drain("c")
