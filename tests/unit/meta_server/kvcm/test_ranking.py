"""The order in which blocks of a group go is exact, whatever was read before: as if all of them were sorted each time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.ranking import Ranking
from meta_server.kvcm.writes import Location, Place, State, Write

PLACES = [Place("a", admin.ST_NFS, "file", "/a", 1), Place("b", admin.ST_3FS, "3fs", "/b", 1)]
POLICIES = [admin.POLICY_LRU, admin.POLICY_LFU, admin.POLICY_TTL, admin.POLICY_COST]


def blocks(instance_id: str, place: Place, sizes: tuple[int, ...]) -> list[Location]:
    layouts = tuple((("kv", size),) for size in sizes)
    count = len(sizes)
    write = Write(
        session_id="",
        instance_id=instance_id,
        group="g",
        place=place,
        layouts=layouts,
        layout_of=bytes(range(count)),
        keys=tuple(range(count)),
        status=bytearray([State.SERVING]) * count,
        created_s=0,
        ends_at=0.0,
    )
    return list(write.locations)


class Model:
    """All blocks in a list, sorted whenever one has to go."""

    def __init__(self, policy: int) -> None:
        self.now = 0.0
        self.ranking = Ranking(lambda: self.now, policy)
        self.kept: list[Location] = []

    def add(self, instance_id: str, place: Place, sizes: tuple[int, ...]) -> None:
        new = blocks(instance_id, place, sizes)
        self.ranking.enter(new, 16)
        self.kept += new

    def read(self, which: list[int]) -> None:
        self.now += 1
        self.ranking.touch([self.kept[i % len(self.kept)] for i in which if self.kept])

    def go(self, count: int, kind: int | None) -> None:
        expected = self._coldest(count, kind)
        found = self.ranking.victims(kind, size_bytes=0, num_keys=count)
        assert found == expected
        for location in found:
            self.kept.remove(location)
            self.ranking.leave(location)

    def _coldest(self, count: int, kind: int | None) -> list[Location]:
        left = [at for at in self.kept if kind in (None, at.write.place.type)]
        found: list[Location] = []
        while left and len(found) < count:
            has: dict[str, int] = {}
            for at in left:
                has[at.write.instance_id] = has.get(at.write.instance_id, 0) + 1
            giver = min(has, key=lambda name: (-has[name], name))
            coldest = min((at for at in left if at.write.instance_id == giver), key=lambda at: (at.rank, at.tick))
            left.remove(coldest)
            found.append(coldest)
        return found


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.sampled_from(["i", "j"]),
            st.sampled_from(PLACES),
            st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
        ),
        st.tuples(st.just("read"), st.lists(st.integers(0, 50), max_size=5)),
        st.tuples(st.just("go"), st.integers(1, 3), st.sampled_from([None, admin.ST_NFS, admin.ST_3FS])),
        st.tuples(st.just("policy"), st.sampled_from(POLICIES)),
    ),
    max_size=40,
)


@given(st.sampled_from(POLICIES), STEPS)
def test_the_coldest_blocks_of_who_has_most_go_first(policy: int, steps: list[tuple[Any, ...]]) -> None:
    model = Model(policy)
    for name, *arguments in steps:
        if name == "policy":
            model.ranking.set_policy(arguments[0])
        else:
            getattr(model, name)(*arguments)
        sizes = [at.size_bytes for at in model.kept]
        assert model.ranking.held(None) == (len(sizes), sum(sizes))


def test_by_cost_a_block_that_saves_more_per_byte_stays_longer_but_not_for_ever() -> None:
    ranking = Ranking(lambda: 0.0, admin.POLICY_COST)
    small, large = blocks("i", PLACES[0], (1, 4))
    ranking.enter([small, large], 16)
    assert ranking.victims(None, size_bytes=0, num_keys=1) == [large]
    ranking.leave(large)
    for _ in range(10):
        (young,) = blocks("i", PLACES[0], (2,))
        ranking.enter([young], 16)
        (gone,) = ranking.victims(None, size_bytes=0, num_keys=1)
        ranking.leave(gone)
        if gone is small:
            return
    pytest.fail("a block that nobody reads never goes")


def test_pinned_and_spared_blocks_stay() -> None:
    ranking = Ranking(lambda: 1.0, admin.POLICY_LRU)
    first, second, third = blocks("i", PLACES[0], (1, 1, 1))
    ranking.enter([first, second, third], 16)
    third.pinned_until = 2.0
    assert ranking.victims(None, size_bytes=0, num_keys=3, spare={second}) == [first]
    ranking.leave(first)
    third.pinned_until = 0.0
    assert ranking.victims(None, size_bytes=0, num_keys=3) == [third, second]
