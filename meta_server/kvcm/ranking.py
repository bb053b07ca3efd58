"""Which served blocks of a group go first: an exact order by its policy, and fair between its instances.

    lru (default)  read longest ago
    lfu            least often read, then read longest ago
    ttl            read longest ago; blocks that were not read for the group's time go by themselves (`reclaim`)
    cost           least often read for the computing that its bytes save; a block that is not read ages (GreedyDual-Size-Frequency,
                   Cherkasova 1998)

Whichever policy, the instance that has most gives first, and the later blocks of a prefix before the earlier ones.

A block's rank only rises while the policy stays. So the heap of an instance may hold old ranks: what comes up with one goes back
with its new one, and what comes up with its own is the coldest indeed. A read costs a few stores, and no heap.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.writes import Location
from meta_server.presence import Clock

SPARED_MAX = 10_000
"""Blocks that may not go, met in one search; then it ends."""
_STALE_MAX = 1024
_Entry = tuple[float, int, Location]


@dataclass(slots=True)
class Order:
    """Served blocks of one instance on one type of storage."""

    tokens_per_block: int
    heap: list[_Entry] = field(default_factory=list)
    """Every block once, with its rank or an older one; and some that are gone."""
    num_keys: int = 0
    size_bytes: int = 0

    def coldest(self) -> Location | None:
        """At the top of the heap."""
        heap = self.heap
        while heap:
            rank, tick, location = heap[0]
            if not location.is_ranked:
                heapq.heappop(heap)
            elif (rank, tick) != (location.rank, location.tick):
                heapq.heapreplace(heap, (location.rank, location.tick, location))
            else:
                return location
        return None

    def rebuild(self) -> None:
        """With the ranks as they are."""
        self.heap = [(at.rank, at.tick, at) for _, _, at in self.heap if at.is_ranked]
        heapq.heapify(self.heap)


class Ranking:
    """All served blocks of one group."""

    def __init__(self, clock: Clock, policy: int) -> None:
        self._clock = clock
        self._policy = policy
        self._orders: dict[tuple[str, int], Order] = {}
        self._tick = 0
        self._floor = 0.0
        """Of policy cost: the rank of what went last, which new blocks begin with."""

    def set_policy(self, policy: int) -> None:
        """Rank all blocks anew if it is another one; takes time for each block."""
        if policy == self._policy:
            return
        self._policy, self._floor = policy, 0.0
        for order in self._orders.values():
            for _, _, location in order.heap:
                location.rank = self._rank(order, location)
            order.rebuild()

    def enter(self, locations: Iterable[Location], tokens_per_block: int) -> None:
        """Blocks of one session that are served from now on, in their order."""
        entering = list(locations)
        if not entering:
            return
        order = self._orders.setdefault(_place_of(entering[0]), Order(tokens_per_block))
        for location in reversed(entering):
            self._tick += 1
            location.tick, location.is_ranked = self._tick, True
            location.rank = self._rank(order, location)
            order.size_bytes += location.size_bytes
            heapq.heappush(order.heap, (location.rank, location.tick, location))
        order.num_keys += len(entering)

    def leave(self, location: Location) -> None:
        """It is served no longer."""
        if not location.is_ranked:
            return
        location.is_ranked = False
        order = self._orders[_place_of(location)]
        order.num_keys -= 1
        order.size_bytes -= location.size_bytes
        if not order.num_keys:
            del self._orders[_place_of(location)]
        elif len(order.heap) > 2 * order.num_keys + _STALE_MAX:
            order.rebuild()

    def touch(self, locations: Iterable[Location]) -> None:
        """Asked for just now; the later blocks of a prefix are colder than its earlier ones."""
        for location in reversed(list(locations)):
            if location.is_ranked:
                self._tick += 1
                location.tick = self._tick
                location.reads += 1
                location.rank = self._rank(self._orders[_place_of(location)], location)

    def held(self, storage_type: int | None) -> tuple[int, int]:
        """Blocks and bytes that could go, pinned ones among them."""
        orders = [order for (_, kind), order in self._orders.items() if storage_type in (None, kind)]
        return sum(order.num_keys for order in orders), sum(order.size_bytes for order in orders)

    def victims(
        self,
        storage_type: int | None,
        *,
        size_bytes: int,
        num_keys: int,
        spare: Collection[Location] = (),
        keys_max: int | None = None,
    ) -> list[Location]:
        """Blocks that together free so much, or as many as there are; the caller removes them all, or puts them all back."""
        found: list[Location] = []
        spared: list[tuple[Order, Location]] = []
        freed_bytes = 0
        for order, location in self._in_turn(storage_type, by_bytes=size_bytes > 0):
            if location in spare or location.pinned_until > self._clock():
                spared.append((order, location))
                if len(spared) >= SPARED_MAX:
                    break
                continue
            found.append(location)
            freed_bytes += location.size_bytes
            self._floor = max(self._floor, location.rank) if self._policy == admin.POLICY_COST else self._floor
            if (freed_bytes >= size_bytes and len(found) >= num_keys) or len(found) == keys_max:
                break
        for order, location in spared:
            heapq.heappush(order.heap, (location.rank, location.tick, location))
        return found

    def put_back(self, victims: Iterable[Location]) -> None:
        """They stay after all."""
        for location in victims:
            heapq.heappush(self._orders[_place_of(location)].heap, (location.rank, location.tick, location))

    def unread_since(self, moment: float, keys_max: int) -> list[Location]:
        """Of policy ttl: blocks that were not read since; the caller removes them all."""
        found: list[Location] = []
        for order in list(self._orders.values()):
            spared: list[Location] = []
            while len(found) < keys_max and len(spared) < SPARED_MAX:
                location = order.coldest()
                if location is None or location.rank >= moment:
                    break
                heapq.heappop(order.heap)
                (spared if location.pinned_until > self._clock() else found).append(location)
            for location in spared:
                heapq.heappush(order.heap, (location.rank, location.tick, location))
        return found

    def _in_turn(self, storage_type: int | None, *, by_bytes: bool) -> Iterator[tuple[Order, Location]]:
        """The coldest block of the instance that has most, again and again; each is taken out of its heap."""
        orders: dict[str, list[Order]] = {}
        for (instance_id, kind), order in self._orders.items():
            if storage_type in (None, kind):
                orders.setdefault(instance_id, []).append(order)
        has = {name: sum(o.size_bytes if by_bytes else o.num_keys for o in held) for name, held in orders.items()}
        queue = [(-amount, name) for name, amount in has.items()]
        heapq.heapify(queue)
        while queue:
            amount, name = queue[0]
            tops = [(top.rank, top.tick, order, top) for order in orders[name] if (top := order.coldest()) is not None]
            if not tops:
                heapq.heappop(queue)
                continue
            _, _, order, location = min(tops, key=lambda top: top[:2])
            heapq.heappop(order.heap)
            heapq.heapreplace(queue, (amount + (location.size_bytes if by_bytes else 1), name))
            yield order, location

    def _rank(self, order: Order, location: Location) -> float:
        if self._policy == admin.POLICY_LFU:
            return float(location.reads)
        if self._policy == admin.POLICY_TTL:
            return self._clock()
        if self._policy == admin.POLICY_COST:
            return self._floor + (1 + location.reads) * order.tokens_per_block / location.size_bytes
        return float(location.tick)


def _place_of(location: Location) -> tuple[str, int]:
    return location.write.instance_id, location.write.place.type
