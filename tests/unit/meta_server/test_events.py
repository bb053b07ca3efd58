"""Whatever changes in the pool, and whatever of it a follower loses: in the end its view is the server's."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from meta_server import events
from stratakv import wire
from stratakv.pool.pool_view import PoolView
from stratakv.wire_events import EventKind, Medium, PoolEvent
from tests.pool_world import NAMESPACE, PAGE_BYTES, World
from tests.unit.meta_server.test_pool_promises import KEYS, PoolMachine

SNAPSHOT_ROWS = 3
ROUNDS_MAX = 200


class FollowedPoolMachine(PoolMachine):
    """The pool, and somebody who hears of it through channels that lose and delay."""

    def __init__(self) -> None:
        super().__init__()
        self.rows_before, events.SNAPSHOT_ROWS = events.SNAPSHOT_ROWS, SNAPSHOT_ROWS
        self.view = PoolView()
        self.on_the_way: list[PoolEvent] = []
        self.part: wire.EventSnapshot | None = None
        self.followed: object = None
        self.follow()

    def follow(self) -> None:
        """The server may have been restarted."""
        if self.followed is not self.world.handlers:
            self.followed = self.world.handlers
            self.world.handlers.events.subscribe(lambda event: self.on_the_way.append(event))

    @rule(count=st.integers(1, 20))
    def hear(self, count: int) -> None:
        self.follow()
        heard, self.on_the_way = self.on_the_way[:count], self.on_the_way[count:]
        for event in heard:
            self.view.take_event(event)

    @precondition(lambda self: self.on_the_way)
    @rule(at=st.integers(0, 10), count=st.integers(1, 3))
    def lose(self, at: int, count: int) -> None:
        del self.on_the_way[at : at + count]

    @rule()
    def ask(self) -> None:
        self.follow()
        if (after := self.view.ask()) is not None:
            self.part = self.world.call(wire.GetEventSnapshot(after), wire.EventSnapshot)

    @precondition(lambda self: self.part is not None)
    @rule(is_lost=st.booleans())
    def be_answered(self, is_lost: bool) -> None:
        part, self.part = self.part, None
        assert part is not None
        if is_lost:
            self.view.unanswered()
        else:
            self.view.take_part(part)

    def teardown(self) -> None:
        try:
            self.catch_up()
            nodes_of = lying_at(self.world)
            assert self.view.node_of.keys() == nodes_of.keys()
            assert all(node in nodes_of[block] for block, node in self.view.node_of.items())
            assert {n for n, is_up in self.view.is_up.items() if is_up} == up(self.world)
        finally:
            events.SNAPSHOT_ROWS = self.rows_before
            super().teardown()

    def catch_up(self) -> None:
        self.follow()
        for _ in range(ROUNDS_MAX):
            if self.part is not None:
                self.be_answered(False)
            self.world.tick(events.ALIVE_S)
            self.hear(len(self.on_the_way))
            if self.view.is_whole and self.view.sequence == self.world.handlers.events.sequence:
                return
            self.ask()
        raise AssertionError("the follower never catches up")


def lying_at(world: World) -> dict[tuple[bytes, bytes], set[str]]:
    """What the server has, from another of its requests."""
    found: dict[tuple[bytes, bytes], set[str]] = {}
    for node in world.call(wire.ListNodes(), wire.Nodes).nodes:
        for page in world.call(wire.ListPages(node.segment.node), wire.Pages).pages:
            found.setdefault((page.namespace, page.key), set()).add(node.segment.node)
    return found


def up(world: World) -> set[str]:
    return {node.segment.node for node in world.call(wire.ListNodes(), wire.Nodes).nodes}


TestFollowedPool = FollowedPoolMachine.TestCase
TestFollowedPool.settings = settings(max_examples=40, stateful_step_count=40)


@pytest.fixture
def heard() -> list[PoolEvent]:
    return []


@pytest.fixture
def world(heard: list[PoolEvent]) -> World:
    world = World()
    world.handlers.events.subscribe(heard.append)
    return world


def put(world: World, keys: list[bytes], node: str) -> None:
    put_id = world.handlers.events.sequence.to_bytes(16, "big")
    request = wire.PutStart(put_id, NAMESPACE, b"".join(keys), PAGE_BYTES, 16, node)
    grant = world.call(request, wire.PutGrant)
    assert grant.segment is not None
    extents = world.daemons[grant.segment.node].allocate(put_id, len(grant.wanted))
    world.call(wire.PutEnd(put_id, grant.segment.epoch, extents), wire.Done)


def test_each_change_is_one_event_with_the_next_number(world: World, heard: list[PoolEvent]) -> None:
    world.start_daemon("a", 8)
    put(world, KEYS[0], "a")
    world.call(wire.Flush(NAMESPACE), wire.Flushed)
    world.start_daemon("a", 8)
    kinds = [
        EventKind.NODE_UP,
        EventKind.BLOCKS_ADDED,
        EventKind.BLOCKS_REMOVED,
        EventKind.NODE_GONE,
        EventKind.NODE_UP,
    ]
    assert [event.kind for event in heard] == kinds
    assert [event.sequence for event in heard] == [1, 2, 3, 4, 5]
    assert {(event.node, event.medium) for event in heard} == {("a", Medium.MEMORY)}
    assert heard[1].keys == heard[2].keys == b"".join(KEYS[0])


def test_a_page_that_goes_to_disk_is_one_move(heard: list[PoolEvent]) -> None:
    world = World(demote_high=0.3, demote_low=0.1)
    world.handlers.events.subscribe(heard.append)
    daemon = world.start_daemon("a", 8)
    world.start_disk("a", 12)
    put(world, KEYS[0], "a")
    daemon.keys.update(zip(daemon.held, KEYS[0], strict=True))
    world.tick(1.0)
    world.tick(1.0)
    world.carry_out_moves()
    moved = [event for event in heard if event.kind is EventKind.BLOCKS_MOVED]
    assert {(event.node, event.medium) for event in moved} == {("a/disk", Medium.DISK)}
    assert not any(event.kind is EventKind.BLOCKS_REMOVED for event in heard)


def test_a_daemon_that_falls_silent_is_down_and_its_blocks_stay_known(world: World, heard: list[PoolEvent]) -> None:
    world.start_daemon("a", 8)
    put(world, KEYS[0], "a")
    daemon = world.daemons.pop("a")
    world.tick(60.0)
    assert heard[-1].kind in (EventKind.NODE_DOWN, EventKind.ALIVE)
    assert [event.kind for event in heard if event.kind is not EventKind.ALIVE][-1] is EventKind.NODE_DOWN
    world.heartbeat(daemon)
    assert heard[-1].kind is EventKind.NODE_UP


def test_while_nothing_happens_the_last_number_is_repeated(world: World, heard: list[PoolEvent]) -> None:
    world.start_daemon("a", 8)
    world.tick(events.ALIVE_S)
    assert (heard[-1].kind, heard[-1].sequence) == (EventKind.ALIVE, 1)


def test_many_blocks_are_several_events(world: World, heard: list[PoolEvent], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "EVENT_KEYS_MAX", 4)
    world.start_daemon("a", 8)
    put(world, KEYS[0], "a")
    added = [event.keys for event in heard if event.kind is EventKind.BLOCKS_ADDED]
    assert added == [b"".join(KEYS[0][:4]), b"".join(KEYS[0][4:])]
