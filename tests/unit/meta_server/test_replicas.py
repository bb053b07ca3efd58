"""Hot pages at several places: when copies are made, who is told of which, and that no hit is lost with one of them."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from meta_server.moves import MOVE_TIMEOUT_S
from stratakv import wire
from stratakv.errors import StrataError
from stratakv.wire_events import EventKind, PoolEvent
from tests.pool_world import NAMESPACE, PAGE_BYTES, World
from tests.unit.meta_server.test_events import FollowedPoolMachine
from tests.unit.meta_server.test_pool_promises import KEYS, PoolMachine, chains, lengths

PAGES = 20
PLACES_MAX = 3
READS = 2
LEVELS = {"reclaim_high": 0.9, "reclaim_low": 0.7, "demote_high": 0.8, "demote_low": 0.6}
nodes = st.sampled_from(["a", "b", "c"])


class ReplicatedPoolMachine(PoolMachine):
    """Readers on three hosts, and daemons that copy what they read."""

    NODES: ClassVar[tuple[str, ...]] = ("a", "b", "c")
    LEVELS: ClassVar[dict[str, float]] = {**LEVELS, "replicas_max": PLACES_MAX, "replica_reads": READS}

    @rule(chain=chains, length=lengths, reader=nodes)
    def read_again_and_again(self, chain: int, length: int, reader: str) -> None:
        for _ in range(READS):
            self.match(chain, length, 1.0, reader)

    @rule(chain=chains, length=lengths, reader=nodes)
    def replicate(self, chain: int, length: int, reader: str) -> None:
        self.write_whole(chain, length)
        self.read_again_and_again(chain, length, reader)
        for name in self.NODES:
            self.copy_away(name, is_finished=True)

    @rule(name=nodes)
    def fall_silent(self, name: str) -> None:
        """Just long enough to count as gone."""
        with contextlib.suppress(StrataError):
            for _ in range(2):
                self.world.tick(1.6, silent=name)

    @rule()
    def restart_c(self) -> None:
        self.restart_daemon("c")

    @invariant()
    def what_lies_anywhere_is_found(self) -> None:
        listed: Counter[bytes] = Counter()
        for state in self.world.call(wire.ListNodes(), wire.Nodes).nodes:
            listed.update(page.key for page in self.world.call(wire.ListPages(state.segment.node), wire.Pages).pages)
        assert all(count <= PLACES_MAX for count in listed.values())
        keys = [key for chain in KEYS for key in chain]
        missing = self.world.call(wire.FindBlocks(NAMESPACE, b"".join(keys)), wire.FoundBlocks).missing
        assert {key for at, key in enumerate(keys) if at not in missing} == listed.keys()

    @invariant()
    def every_copy_is_accounted_for(self) -> None:
        stats = self.world.stats()
        assert stats.replica_bytes == stats.replicas * PAGE_BYTES
        assert stats.bytes_committed == (stats.blocks + stats.replicas) * PAGE_BYTES


class FollowedReplicatedPoolMachine(FollowedPoolMachine, ReplicatedPoolMachine):
    """And somebody who hears of what happens to them."""


TestReplicatedPool = ReplicatedPoolMachine.TestCase
TestReplicatedPool.settings = settings(max_examples=60, stateful_step_count=40)
TestFollowedReplicatedPool = FollowedReplicatedPoolMachine.TestCase
TestFollowedReplicatedPool.settings = settings(max_examples=30, stateful_step_count=40)


def world_of(**changes: object) -> World:
    world = World(**{**LEVELS, "replicas_max": PLACES_MAX, "replica_reads": READS, **changes})
    for name in ("a", "b", "c"):
        world.start_daemon(name, pages=PAGES)
    return world


@pytest.fixture
def world() -> Iterator[World]:
    world = world_of()
    yield world
    world.close()


def put(world: World, count: int, node: str) -> list[bytes]:
    put_id, keys = os.urandom(16), [os.urandom(32) for _ in range(count)]
    grant = world.call(wire.PutStart(put_id, NAMESPACE, b"".join(keys), PAGE_BYTES, 16, node), wire.PutGrant)
    assert grant.segment is not None
    assert grant.segment.node == node
    finish(world, put_id, keys, grant)
    return keys


def finish(world: World, put_id: bytes, keys: list[bytes], grant: wire.PutGrant) -> None:
    assert grant.segment is not None
    daemon = world.daemons[grant.segment.node]
    extents = daemon.allocate(put_id, len(grant.wanted))
    daemon.keys.update(zip(extents, [keys[i] for i in grant.wanted], strict=True))
    world.call(wire.PutEnd(put_id, grant.segment.epoch, extents), wire.Done)


def read(world: World, keys: list[bytes], reader: str = "", times: int = 1) -> list[str]:
    """The nodes of what is found, by the last of so many lookups."""
    for _ in range(times):
        match = world.call(wire.MatchPrefix(NAMESPACE, b"".join(keys), 1.0, reader), wire.Match)
        world.call(wire.ReleaseLease(match.lease_id), wire.Done)
    return [place.node for place in match.places()]


def copy(world: World, name: str) -> int:
    """The daemon carries out one heartbeat's orders; how many."""
    source = world.daemons[name]
    world.heartbeat(source)
    ordered = len(source.moves_away)
    if ordered:
        put_id = os.urandom(16)
        keys, grant = world.start_copies(source, put_id)
        if grant.segment is not None:
            finish(world, put_id, keys, grant)
    return ordered


def replicated(world: World, count: int = 4) -> list[bytes]:
    """Pages that lie on a first, and on b."""
    keys = put(world, count, "a")
    read(world, keys, "b", READS)
    copy(world, "a")
    assert read(world, keys, "b") == ["b"] * count
    return keys


def test_a_page_that_was_ordered_twice_is_copied_once(world: World) -> None:
    keys = put(world, 2, "a")
    read(world, keys, "b", READS)
    source = world.daemons["a"]
    world.heartbeat(source)
    source.moves_away *= 2
    asked, grant = world.start_copies(source, put_id := os.urandom(16))
    assert (len(asked), grant.wanted) == (4, [0, 1])
    finish(world, put_id, asked, grant)
    assert world.stats().replicas == 2


def test_a_page_that_another_host_reads_often_lies_there_too(world: World) -> None:
    keys = put(world, 4, "a")
    read(world, keys, "b", READS - 1)
    assert copy(world, "a") == 0
    read(world, keys, "b")
    assert copy(world, "a") == 4
    assert read(world, keys, "b") == ["b"] * 4
    assert read(world, keys, "a") == ["a"] * 4
    stats = world.stats()
    assert (stats.blocks, stats.replicas, stats.replicas_made, stats.replica_reads) == (4, 4, 4, 4)


def test_readers_elsewhere_are_spread_over_the_places_in_long_runs(world: World) -> None:
    keys = replicated(world)
    assert {tuple(read(world, keys)) for _ in range(4)} == {("a", "a", "b", "b"), ("b", "b", "a", "a")}


def test_nothing_is_copied_by_default() -> None:
    world = world_of(replicas_max=1)
    keys = put(world, 4, "a")
    read(world, keys, "b", 10)
    assert copy(world, "a") == 0
    world.close()


@pytest.mark.parametrize("reader", ["", "a", "nosuch"])
def test_reads_at_the_own_daemon_or_of_nobody_knows_where_are_not_counted(world: World, reader: str) -> None:
    keys = put(world, 4, "a")
    read(world, keys, reader, 10)
    assert copy(world, "a") == 0


def test_a_block_lies_at_so_many_places_at_most() -> None:
    world = world_of(replicas_max=2)
    keys = replicated(world)
    read(world, keys, "c", 10)
    assert copy(world, "a") == copy(world, "b") == 0
    world.close()


def test_when_the_readers_daemon_is_full_the_emptiest_takes_the_copies(world: World) -> None:
    put(world, 12, "b")
    keys = put(world, 4, "a")
    read(world, keys, "b", READS)
    copy(world, "a")
    assert read(world, keys, "c") == ["c"] * 4


def test_without_room_to_spare_nothing_is_copied_and_nothing_goes(world: World) -> None:
    keys = put(world, 12, "a")
    for name in ("b", "c"):
        put(world, 12, name)
    read(world, keys, "b", 5)
    assert copy(world, "a") == 0
    assert world.stats().blocks == 36


def test_room_that_went_meanwhile_is_not_taken(world: World) -> None:
    keys = put(world, 4, "a")
    read(world, keys, "b", READS)
    put(world, 11, "b")
    copy(world, "a")
    assert Counter(read(world, keys, "b")) == {"a": 3, "b": 1}


def test_pages_that_were_ordered_twice_are_copied_once(world: World) -> None:
    keys = put(world, 4, "a")
    for _ in range(2):
        read(world, keys, "b", READS)
        world.heartbeat(world.daemons["a"])
        for _ in range(2):
            world.tick(MOVE_TIMEOUT_S)
    read(world, keys, "b", READS)
    assert copy(world, "a") == 12
    assert read(world, keys, "b") == ["b"] * 4
    assert world.stats().replicas == 4


@pytest.mark.parametrize("lost", ["a", "b"])
def test_a_daemon_that_is_gone_costs_no_hit(world: World, lost: str) -> None:
    keys = replicated(world)
    other = "b" if lost == "a" else "a"
    for _ in range(3):
        world.tick(1.6, silent=lost)
    assert read(world, keys) == [other] * 4
    world.heartbeat(world.daemons[lost])
    assert read(world, keys, lost) == [lost] * 4
    world.start_daemon(lost, pages=PAGES)
    assert read(world, keys, lost) == [other] * 4


def test_a_damaged_place_goes_alone(world: World) -> None:
    keys = replicated(world)
    for reader in ("a", "b"):
        match = world.call(wire.MatchPrefix(NAMESPACE, b"".join(keys), 1.0, reader), wire.Match)
        world.call(wire.ReportCorrupt(NAMESPACE, keys[1], match.places()[1]), wire.Done)
        other = "b" if reader == "a" else "a"
        expected = [other if at == 1 else reader for at in range(4)] if reader == "a" else ["b"]
        assert read(world, keys, reader) == expected


def test_flushed_blocks_are_gone_from_all_places(world: World) -> None:
    keys = replicated(world)
    assert world.call(wire.Flush(NAMESPACE), wire.Flushed).num_blocks == 4
    assert read(world, keys) == []
    world.settle()
    assert [daemon.used_bytes for daemon in world.daemons.values()] == [0, 0, 0]


def test_further_places_go_first_when_room_is_needed() -> None:
    world = world_of(reclaim_low=0.75)
    keys = replicated(world)
    others = put(world, 15, "b")
    read(world, keys, "b", 10)
    world.tick(1.0)
    assert read(world, keys, "b") == ["a"] * 4
    assert len(read(world, others)) == 15
    assert (world.stats().replicas_removed, world.stats().replicas) == (4, 0)
    world.close()


def test_further_places_are_dropped_and_not_taken_to_the_disk(world: World) -> None:
    world.start_disk("b", pages=PAGES)
    keys = replicated(world)
    others = put(world, 13, "b")
    world.tick(1.0)
    world.carry_out_moves()
    assert read(world, keys, "b") == ["a"] * 4
    assert (world.stats().replicas, world.stats().demoted) == (0, 1)
    assert len(read(world, others)) == 13


def test_a_drained_daemon_gives_up_what_lies_elsewhere_and_moves_the_rest(world: World) -> None:
    keys, lone = replicated(world), put(world, 2, "a")
    read(world, lone)
    world.drain("a")
    assert copy(world, "a") == 2
    assert world.drain("a").is_done
    assert read(world, keys) == ["b"] * 4
    assert set(read(world, lone)) <= {"b", "c"}


def test_what_is_ordered_as_a_copy_is_no_move_after_a_restart(world: World) -> None:
    keys = put(world, 4, "a")
    read(world, keys, "b", READS)
    world.heartbeat(world.daemons["a"])
    world.restart()
    world.tick(1.0)
    _, grant = world.start_copies(world.daemons["a"], os.urandom(16))
    assert grant == wire.PutGrant(wanted=[])
    assert read(world, keys) == ["a"] * 4


@pytest.mark.parametrize("places_max", [1, 3])
def test_a_restart_finds_all_places_again_or_frees_those_that_may_not_be(world: World, places_max: int) -> None:
    keys = replicated(world)
    world.settings = type(world.settings)(**LEVELS, replicas_max=places_max)  # type: ignore[arg-type]
    world.restart()
    world.settle()
    assert {node for reader in "ab" for node in read(world, keys, reader)} == ({"a", "b"} if places_max > 1 else {"b"})
    assert world.stats().replicas == (4 if places_max > 1 else 0)
    assert sum(daemon.used_bytes for daemon in world.daemons.values()) == world.stats().bytes_committed


def test_a_copy_that_ends_after_a_restart_is_freed(world: World) -> None:
    keys = put(world, 4, "a")
    read(world, keys, "b", READS)
    world.heartbeat(world.daemons["a"])
    put_id = os.urandom(16)
    copied, grant = world.start_copies(world.daemons["a"], put_id)
    world.restart()
    world.tick(1.0)
    finish(world, put_id, copied, grant)
    world.settle()
    assert read(world, keys, "b") == ["a"] * 4
    assert world.daemons["b"].used_bytes == 0


def test_a_page_that_was_flushed_while_it_was_copied_does_not_come_back(world: World) -> None:
    keys = put(world, 4, "a")
    read(world, keys, "b", READS)
    world.heartbeat(world.daemons["a"])
    put_id = os.urandom(16)
    copied, grant = world.start_copies(world.daemons["a"], put_id)
    world.call(wire.Flush(), wire.Flushed)
    finish(world, put_id, copied, grant)
    world.settle()
    assert read(world, keys) == []
    assert [daemon.used_bytes for daemon in world.daemons.values()] == [0, 0, 0]


def test_pins_follow_their_blocks_to_the_places_that_are_left(world: World) -> None:
    keys = replicated(world)
    pinned = world.call(wire.PinPrefix(NAMESPACE, b"".join(keys), 1e6), wire.Pinned)
    world.start_daemon("a", pages=PAGES)
    assert world.call(wire.Flush(), wire.Flushed).num_blocks == 0
    assert read(world, keys) == ["b"] * 4
    world.call(wire.Unpin(pinned.pin_id), wire.Done)
    assert world.call(wire.Flush(), wire.Flushed).num_blocks == 4


def test_followers_hear_of_moves_and_of_the_loss_of_the_last_place_only(world: World) -> None:
    heard: list[PoolEvent] = []
    keys = put(world, 2, "a")
    world.handlers.events.subscribe(heard.append)
    read(world, keys, "b", READS)
    copy(world, "a")
    world.start_daemon("a", pages=PAGES)
    world.call(wire.Flush(), wire.Flushed)
    kinds = [(event.kind, event.node) for event in heard]
    moved, removed = (EventKind.BLOCKS_MOVED, "b"), (EventKind.BLOCKS_REMOVED, "b")
    assert kinds == [moved, (EventKind.NODE_GONE, "a"), (EventKind.NODE_UP, "a"), removed]


def test_the_quota_of_a_namespace_counts_all_places_and_takes_further_ones_first(world: World) -> None:
    keys = replicated(world)
    rule_ = wire.CacheRule(NAMESPACE, memory_bytes_max=5 * PAGE_BYTES)
    world.call(wire.SetCacheRule(rule_), wire.Done)
    world.tick(2.0)
    assert len(read(world, keys)) == 4
    assert world.stats().replicas == 1


def test_namespaces_count_blocks_once_and_bytes_everywhere(world: World) -> None:
    replicated(world)
    (state,) = world.call(wire.ListNamespaces(), wire.Namespaces).namespaces
    assert state.blocks == 4
    assert state.bytes_by_node == {"a": 4 * PAGE_BYTES, "b": 4 * PAGE_BYTES}
