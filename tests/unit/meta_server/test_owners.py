"""Whose pages are: counted through all that happens to them, and each owner held to its limit at its own pages' cost."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from meta_server.counts import Tier
from meta_server.owner_reclaim import OWNERS_MAX, REASON
from meta_server.owners import NUMBERS_MAX, Owners
from meta_server.slots import SlotTable
from stratakv import wire
from stratakv.errors import InvalidRequest
from tests.pool_world import NAMESPACE, PAGE_BYTES, Fault, World
from tests.unit.meta_server.test_pool_promises import chains, indexes, lengths
from tests.unit.meta_server.test_replicas import ReplicatedPoolMachine, copy, finish, read

ACME, BETA = 7, 8
PAGES = 40
owner_ids = st.sampled_from([0, ACME, BETA])
limits = st.one_of(st.none(), st.integers(0, 12))


class OwnedPoolMachine(ReplicatedPoolMachine):
    """Writers of several owners, with limits that change."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = 0

    def next_owner(self) -> int:
        return self.owner

    @rule(owner=owner_ids)
    def become(self, owner: int) -> None:
        self.owner = owner

    @rule(memory=limits, disk=limits)
    def limit_owner(self, memory: int | None, disk: int | None) -> None:
        sizes = (None if pages is None else pages * PAGE_BYTES for pages in (memory, disk))
        self.world.call(wire.SetOwnerLimits([wire.OwnerLimit(ACME, "acme", *sizes)]), wire.Done)

    @rule(chain=chains, length=lengths, prefer=st.sampled_from(["a", "b", None]))
    def put_start(self, chain: int, length: int, prefer: str | None) -> None:
        before = len(self.writers)
        super().put_start(chain, length, prefer)
        for writer in self.writers[before:]:
            self.written_by(writer.epoch, writer.extents, self.owner)

    @rule(name=st.sampled_from(["a", "b", "a/disk"]), is_finished=st.booleans())
    def copy_away(self, name: str, is_finished: bool) -> None:
        before = len(self.writers)
        super().copy_away(name, is_finished=False)
        for writer in self.writers[before:]:
            there = {page.key: page.extent for page in self.world.call(wire.ListPages(name), wire.Pages).pages}
            owners = {self.world.daemons[name].owners[there[key]] for key in writer.keys}
            assert len(owners) == 1, "a put is one owner's"
            self.written_by(writer.epoch, writer.extents, owners.pop())
            if is_finished:
                self.put_end(len(self.writers) - 1)

    @rule(index=indexes)
    def restart_with_puts_under_way(self, index: int) -> None:
        self.world.restart()
        if self.writers:
            self.put_end(index)

    def written_by(self, epoch: bytes, extents: list[wire.Extent], owner: int) -> None:
        daemon = next(d for d in self.world.daemons.values() if d.segment.epoch == epoch)
        daemon.owners.update(dict.fromkeys(extents, owner))

    @invariant()
    def every_byte_is_its_writers(self) -> None:
        owners = self.world.handlers._catalog.index.owners
        for node in self.world.handlers.nodes:
            written_by = self.world.daemons[node.segment.node].owners
            pages = self.world.call(wire.ListPages(node.segment.node), wire.Pages).pages
            expected: Counter[int] = Counter()
            for page in pages:
                expected[written_by[page.extent]] += page.page_bytes
            del expected[0]
            assert owners.sizes({node.index}) == expected

    def teardown(self) -> None:
        self.world.store.fault = Fault.NONE
        self.world.settle()
        known = states(self.world)
        self.world.restart()
        for _ in range(3):  # daemons report themselves and their disks
            self.world.tick(0.5)
        assert states(self.world) == known, "a restart changes nothing"
        super().teardown()


TestOwnedPool = OwnedPoolMachine.TestCase
TestOwnedPool.settings = settings(max_examples=60, stateful_step_count=40)


def states(world: World) -> dict[int, tuple[int, int]]:
    """Owner → pages in memory and on disk, of those that have any."""
    owners = world.call(wire.ListOwners(), wire.OwnerStates).owners
    sizes = {o.limit.owner: (o.memory_bytes // PAGE_BYTES, o.disk_bytes // PAGE_BYTES) for o in owners}
    return {owner: pages for owner, pages in sizes.items() if any(pages)}


@pytest.fixture
def world() -> Iterator[World]:
    world = World(lease_s_max=3600.0)
    world.start_daemon("a", pages=PAGES)
    yield world
    world.close()


@pytest.fixture
def tiered(world: World) -> World:
    world.start_disk("a", pages=PAGES)
    world.tick(1.0)
    return world


def put(world: World, count: int, owner: int, node: str = "a") -> list[bytes]:
    put_id, keys = os.urandom(16), [os.urandom(32) for _ in range(count)]
    request = wire.PutStart(put_id, NAMESPACE, b"".join(keys), PAGE_BYTES, 16, node, owner=owner)
    grant = world.call(request, wire.PutGrant)
    assert len(grant.wanted) == count
    finish(world, put_id, keys, grant)
    return keys


def limit(world: World, owner: int, memory: int | None = None, disk: int | None = None) -> None:
    sizes = (None if pages is None else pages * PAGE_BYTES for pages in (memory, disk))
    world.call(wire.SetOwnerLimits([wire.OwnerLimit(owner, "acme", *sizes)]), wire.Done)


def look(world: World, times: int = 4) -> None:
    """Limits are applied, orders carried out and reported."""
    for _ in range(times):
        world.tick(1.0)
        world.carry_out_moves()


def there(world: World, keys: list[bytes]) -> list[int]:
    """Positions of the keys that are in the pool."""
    missing = world.call(wire.FindBlocks(NAMESPACE, b"".join(keys)), wire.FoundBlocks).missing
    return [at for at in range(len(keys)) if at not in missing]


def removed(world: World, tier: Tier) -> int:
    return world.handlers.counts.removed[tier, REASON]


def test_an_owner_over_its_limit_loses_its_own_coldest_pages(world: World) -> None:
    limit(world, ACME, memory=10)
    others, nobodys, old = put(world, 8, BETA), put(world, 8, 0), put(world, 5, ACME)
    new = [put(world, 1, ACME)[0] for _ in range(6)]
    look(world)
    assert states(world) == {ACME: (8, 0), BETA: (8, 0)}
    assert there(world, new) == list(range(6))
    assert there(world, old) == [0, 1], "the end of a prefix goes before its beginning"
    assert (len(there(world, others)), len(there(world, nobodys))) == (8, 8)


def test_nothing_goes_before_the_high_level_and_nothing_more_below_the_low_one(world: World) -> None:
    limit(world, ACME, memory=20)
    put(world, 19, ACME)
    look(world)
    assert states(world) == {ACME: (19, 0)}
    put(world, 1, ACME)
    look(world)
    assert states(world) == {ACME: (17, 0)}


def test_what_is_read_or_pinned_stays(world: World) -> None:
    limit(world, ACME, memory=5)
    leased, pinned, other = put(world, 4, ACME), put(world, 4, ACME), put(world, 4, ACME)
    lease = world.call(wire.MatchPrefix(NAMESPACE, b"".join(leased), 600.0), wire.Match)
    world.call(wire.PinPrefix(NAMESPACE, b"".join(pinned), 600.0), wire.Pinned)
    look(world)
    assert [len(there(world, keys)) for keys in (leased, pinned, other)] == [4, 4, 0]
    world.call(wire.ReleaseLease(lease.lease_id), wire.Done)
    look(world)
    assert [len(there(world, keys)) for keys in (leased, pinned)] == [0, 4]


def test_a_namespace_that_is_kept_is_no_way_around_a_limit(world: World) -> None:
    world.call(wire.SetCacheRule(wire.CacheRule(NAMESPACE, is_kept=True)), wire.Done)
    limit(world, ACME, memory=10)
    put(world, 12, ACME)
    look(world)
    assert states(world) == {ACME: (8, 0)}


def test_where_there_is_a_disk_pages_go_there(tiered: World) -> None:
    limit(tiered, ACME, memory=10)
    others, keys = put(tiered, 10, BETA), put(tiered, 9, ACME)
    look(tiered)
    assert states(tiered) == {ACME: (7, 2), BETA: (10, 0)}
    assert there(tiered, keys) == list(range(9))
    assert len(there(tiered, others)) == 10
    assert removed(tiered, Tier.MEMORY) == 0


def test_the_disk_has_a_limit_of_its_own(tiered: World) -> None:
    limit(tiered, ACME, memory=10, disk=10)
    for _ in range(8):
        put(tiered, 5, ACME)
        look(tiered)
    memory, disk = states(tiered)[ACME]
    assert memory <= 8
    assert 8 <= disk <= 9
    assert removed(tiered, Tier.DISK) > 0
    assert removed(tiered, Tier.MEMORY) == 0


@pytest.mark.parametrize("memory", [10, None])
def test_an_owner_that_may_have_nothing_on_disk_has_nothing_copied_there(tiered: World, memory: int | None) -> None:
    limit(tiered, ACME, memory=memory, disk=0)
    for _ in range(5):
        put(tiered, 5, ACME)
        put(tiered, 2, BETA)
        look(tiered, times=2)
    assert states(tiered)[ACME][1] == 0
    assert removed(tiered, Tier.DISK) == 0


def test_an_owner_that_may_have_nothing_in_memory_has_it_on_disk(tiered: World) -> None:
    limit(tiered, ACME, memory=0)
    keys = put(tiered, 5, ACME)
    look(tiered)
    assert states(tiered) == {ACME: (0, 5)}
    read(tiered, keys, times=3)
    look(tiered)
    assert states(tiered) == {ACME: (0, 5)}
    assert len(there(tiered, keys)) == 5


def test_what_comes_faster_than_the_disk_takes_it_is_removed(tiered: World) -> None:
    limit(tiered, ACME, memory=10)
    tiered.handlers._moves.order = lambda *_: []  # type: ignore[method-assign]
    put(tiered, 12, ACME)
    tiered.tick(1.0)
    assert states(tiered) == {ACME: (8, 0)}


def test_copies_go_first_and_the_block_stays(world: World) -> None:
    world.settings = replace(world.settings, replicas_max=2, replica_reads=1)
    world.restart()
    world.start_daemon("b", pages=PAGES)
    world.tick(1.0)
    keys = put(world, 8, ACME)
    read(world, keys, "b")
    assert copy(world, "a") == 8
    assert states(world) == {ACME: (16, 0)}
    limit(world, ACME, memory=10)
    look(world)
    assert states(world) == {ACME: (8, 0)}
    assert there(world, keys) == list(range(8))


def test_no_copies_are_made_that_would_have_to_leave_again(world: World) -> None:
    world.settings = replace(world.settings, replicas_max=2, replica_reads=1)
    world.restart()
    world.start_daemon("b", pages=PAGES)
    world.tick(1.0)
    limit(world, ACME, memory=20)
    read(world, put(world, 8, ACME), "b")
    assert copy(world, "a") == 6
    assert states(world) == {ACME: (14, 0)}


def test_everybody_has_a_turn(world: World) -> None:
    owners = range(1, 2 * OWNERS_MAX + 2)
    pinned = [put(world, 1, owner) for owner in owners]
    for keys in pinned[:OWNERS_MAX]:
        world.call(wire.PinPrefix(NAMESPACE, b"".join(keys), 600.0), wire.Pinned)
    world.call(wire.SetOwnerLimits([wire.OwnerLimit(owner, "x", 0) for owner in owners]), wire.Done)
    look(world)
    assert list(states(world)) == list(owners)[:OWNERS_MAX]


def test_limits_are_those_that_were_told_last(world: World) -> None:
    limit(world, ACME, memory=10)
    limit(world, BETA, memory=10)
    put(world, 12, ACME)
    look(world)
    assert states(world) == {ACME: (12, 0)}


def test_a_restart_keeps_whose_pages_are_and_learns_limits_anew(world: World) -> None:
    limit(world, ACME, memory=30)
    put(world, 20, ACME)
    put(world, 4, BETA)
    world.restart()
    world.tick(1.0)
    assert states(world) == {ACME: (20, 0), BETA: (4, 0)}
    look(world)
    assert states(world)[ACME] == (20, 0)
    limit(world, ACME, memory=10)
    look(world)
    assert states(world) == {ACME: (8, 0), BETA: (4, 0)}


def test_limits_that_make_no_sense_are_refused(world: World) -> None:
    for bad in (wire.OwnerLimit(0, "acme"), wire.OwnerLimit(1, ""), wire.OwnerLimit(1, "acme", -1)):
        with pytest.raises(InvalidRequest):
            world.call(wire.SetOwnerLimits([bad]), wire.Done)


@settings(max_examples=40)
@given(st.lists(st.tuples(owner_ids, st.integers(1, 6)), max_size=7), st.integers(1, 20))
def test_nobody_else_loses_anything(puts: list[tuple[int, int]], pages: int) -> None:
    world = World(reclaim_high=1.0)
    world.start_daemon("a", pages=100)
    limit(world, ACME, memory=pages)
    written = [(owner, put(world, count, owner)) for owner, count in puts]
    look(world)
    for owner, keys in written:
        if owner != ACME:
            assert len(there(world, keys)) == len(keys)
    assert states(world).get(ACME, (0, 0))[0] <= pages
    world.close()


def test_more_owners_than_there_are_numbers_are_nobody() -> None:
    table = SlotTable()
    owners = Owners(table)
    slots = table.allocate(NUMBERS_MAX + 1)
    table.segment[slots], table.page_bytes[slots] = 0, 1
    for slot in slots.tolist():
        owners.enter(slots[slot : slot + 1], slot + 1)
    assert len(owners.sizes({0})) == NUMBERS_MAX
    assert owners.of(slots[-1:]).tolist() == [0]
    owners.leave(slots[:1])
    table.release(slots[:1])
    owners.enter(again := table.allocate(1), NUMBERS_MAX + 1)
    assert owners.of(again).tolist() == [NUMBERS_MAX + 1], "a number is given to the next one"
