"""What operators say of namespaces and prefixes: kept over a restart, and carried out."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from stratakv import wire
from stratakv.errors import InvalidRequest
from tests.pool_world import NAMESPACE, PAGE_BYTES, Daemon, World

OTHER = b"o" * 16
PAGES = 20


@pytest.fixture
def world() -> Iterator[World]:
    world = World(reclaim_high=0.9, reclaim_low=0.5, demote_high=1.0)
    world.start_daemon("a", pages=PAGES)
    yield world
    world.close()


def put(world: World, count: int, namespace: bytes = NAMESPACE) -> list[bytes]:
    put_id, keys = os.urandom(16), [os.urandom(32) for _ in range(count)]
    grant = world.call(wire.PutStart(put_id, namespace, b"".join(keys), PAGE_BYTES, 16), wire.PutGrant)
    assert grant.segment is not None
    assert len(grant.wanted) == count
    daemon: Daemon = world.daemons[grant.segment.node]
    world.call(wire.PutEnd(put_id, grant.segment.epoch, daemon.allocate(put_id, count)), wire.Done)
    return keys


def found(world: World, keys: list[bytes], namespace: bytes = NAMESPACE) -> int:
    return world.call(wire.MatchPrefix(namespace, b"".join(keys)), wire.Match).num_blocks


def fill(world: World) -> None:
    """Twice as much as the segment holds, of another namespace."""
    for _ in range(2 * PAGES // 2):
        put(world, 2, OTHER)
        for _ in range(3):  # reclaimed, ordered free, reported free
            world.tick(1.0)


def set_rule(world: World, **rule: object) -> None:
    world.call(wire.SetCacheRule(wire.CacheRule(NAMESPACE, **rule)), wire.Done)  # type: ignore[arg-type]


def test_pages_nobody_asks_for_are_dropped_after_their_time_to_live(world: World) -> None:
    set_rule(world, ttl_s=60.0)
    unread, read, other = put(world, 3), put(world, 3), put(world, 3, OTHER)
    for _ in range(12):
        world.tick(10.0)
        world.call(wire.MatchPrefix(NAMESPACE, b"".join(read), 1.0), wire.Match)
    assert (found(world, unread), found(world, read), found(world, other, OTHER)) == (0, 3, 3)


def test_a_namespace_takes_no_more_room_than_its_rule_allows(world: World) -> None:
    set_rule(world, memory_bytes_max=4 * PAGE_BYTES)
    first, second, other = put(world, 3), put(world, 3), put(world, 3, OTHER)
    world.tick(2.0)
    assert (found(world, first), found(world, second), found(world, other, OTHER)) == (1, 3, 3)


def test_a_namespace_that_is_kept_outlives_younger_ones(world: World) -> None:
    set_rule(world, is_kept=True)
    kept = put(world, 8)
    others = [put(world, 4, OTHER) for _ in range(3)]
    for _ in range(3):
        world.tick(2.0)
    assert found(world, kept) == 8
    assert sum(found(world, keys, OTHER) for keys in others) < 12


def test_rules_outlive_the_meta_server_and_end_when_taken_back(world: World) -> None:
    set_rule(world, memory_bytes_max=2 * PAGE_BYTES)
    world.restart()
    world.tick(0.5)
    keys = put(world, 5)
    world.tick(2.0)
    assert found(world, keys) == 2
    (state,) = world.call(wire.ListNamespaces(), wire.Namespaces).namespaces
    assert (state.blocks, state.bytes_by_node) == (2, {"a": 2 * PAGE_BYTES})
    assert state.rule.memory_bytes_max == 2 * PAGE_BYTES
    set_rule(world)
    more = put(world, 5)
    world.tick(2.0)
    assert found(world, more) == 5


def test_a_pinned_prefix_stays_until_its_time_is_over(world: World) -> None:
    keys = put(world, 4)
    pinned = world.call(wire.PinPrefix(NAMESPACE, b"".join(keys), 100.0), wire.Pinned)
    assert pinned.num_blocks == 4
    fill(world)
    assert found(world, keys) == 4
    world.tick(200.0)
    fill(world)
    assert found(world, keys) < 4


def test_a_pin_can_be_taken_back(world: World) -> None:
    keys = put(world, 4)
    pinned = world.call(wire.PinPrefix(NAMESPACE, b"".join(keys), 1e6), wire.Pinned)
    for _ in range(2):
        world.call(wire.Unpin(pinned.pin_id), wire.Done)
    assert world.call(wire.Flush(), wire.Flushed).num_blocks == 4


def test_what_is_not_there_cannot_be_pinned(world: World) -> None:
    assert world.call(wire.PinPrefix(NAMESPACE, os.urandom(32), 10.0), wire.Pinned) == wire.Pinned(0, 0)


@pytest.mark.parametrize("rule", [{"ttl_s": -1.0}, {"ttl_s": float("nan")}, {"ttl_s": 1e9}, {"memory_bytes_max": -1}])
def test_a_rule_that_makes_no_sense_is_refused(world: World, rule: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        set_rule(world, **rule)


def limit(world: World, pages: int) -> None:
    world.call(wire.SetNodeLimit("a", pages * PAGE_BYTES), wire.Done)


def test_a_limited_daemon_gives_up_its_coldest_pages_and_takes_no_more_than_its_limit(world: World) -> None:
    cold, hot = put(world, 8), put(world, 4)
    limit(world, 8)
    for _ in range(3):
        world.tick(1.0)
    assert found(world, hot) == 4
    assert found(world, cold) == 0
    assert world.daemons["a"].used_bytes == 4 * PAGE_BYTES
    put(world, 4)
    limit(world, 0)
    put(world, 12)


def test_a_limit_outlives_the_meta_server_as_the_daemon_knows_it(world: World) -> None:
    limit(world, 8)
    world.tick(1.0)
    world.restart()
    world.call(wire.RegisterNode(world.daemons["a"].segment), wire.Registered)
    world.tick(1.0)
    (node,) = world.call(wire.ListNodes(), wire.Nodes).nodes
    assert (node.limit_bytes, node.free_bytes) == (8 * PAGE_BYTES, 8 * PAGE_BYTES)


def test_pages_beyond_a_limit_go_to_the_disk_if_there_is_one() -> None:
    world = World(reclaim_high=0.9, reclaim_low=0.5, demote_high=0.8, demote_low=0.5)
    world.start_daemon("a", pages=PAGES)
    world.start_disk("a", pages=PAGES)
    keys = put(world, 12)
    daemon = world.daemons["a"]
    daemon.keys.update(zip(daemon.held, keys, strict=True))
    limit(world, 8)
    world.run(_tick(world))
    for _ in range(3):
        world.tick(0.5)
        world.carry_out_moves()
    assert found(world, keys) == 12
    assert world.stats().evictions == 0
    assert daemon.used_bytes <= 8 * PAGE_BYTES
    world.close()


async def _tick(world: World) -> None:
    world.handlers.tick()


@pytest.mark.parametrize(("node", "size_bytes"), [("nosuch", 1), ("a", -1), ("a", 1 << 40)])
def test_a_limit_that_makes_no_sense_is_refused(world: World, node: str, size_bytes: int) -> None:
    with pytest.raises(InvalidRequest):
        world.call(wire.SetNodeLimit(node, size_bytes), wire.Done)
