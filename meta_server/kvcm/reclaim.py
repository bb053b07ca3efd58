"""Keeps groups within their quotas: room for what is about to be written, and reclaiming above a level, down to a lower one.

Nothing here waits: blocks leave memory at once, their files are deleted later (`files`). Reclaiming takes so many blocks a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from meta_server.kvcm.entities import Group
from meta_server.kvcm.errors import CapacityReached
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.writes import Location, Write
from meta_server.presence import Clock

RECLAIM_LOW = 0.9
"""Reclaiming goes on down to this share of the level at which it begins."""
TURN_KEYS_MAX = 2000
"""Blocks reclaimed of one group in one turn; a group's `reclaim_step_size` may say less."""


class Reclaimer:
    """Of all groups."""

    def __init__(self, clock: Clock, remove: Callable[[list[Location]], object]) -> None:
        self._clock = clock
        self._remove = remove
        self._under_way: set[tuple[str, int | None]] = set()
        """Group and storage type (-1: its keys) whose level was passed, until they are low again."""

    def make_room(self, group: Group, write: Write, spare: Collection[Location]) -> None:
        """So that the session's blocks fit, without `spare`. Nothing goes if that is not enough. Raises CapacityReached."""
        excess = _excess(group, write)
        for kind, size_bytes, num_keys in excess:
            could_keys, could_bytes = group.ranking.held(kind)
            if could_keys < num_keys or could_bytes < size_bytes:
                raise _full(group, num_keys)
        chosen: list[Location] = []
        for kind, size_bytes, num_keys in excess:
            # What goes for one limit counts for the next one, too.
            left_bytes = size_bytes - _bytes_of(chosen, kind)
            left_keys = num_keys - len(chosen) if num_keys else 0
            if left_bytes <= 0 and left_keys <= 0:
                continue
            found = group.ranking.victims(kind, size_bytes=left_bytes, num_keys=left_keys, spare=spare)
            chosen += found
            if _bytes_of(found, kind) < left_bytes or len(found) < left_keys:
                group.ranking.put_back(chosen)
                raise _full(group, num_keys)
        self._remove(chosen)

    def turn(self, group: Group) -> None:
        """Remove what is above a level, and what is too old."""
        keys_max = min(group.reclaim_step_size or TURN_KEYS_MAX, TURN_KEYS_MAX)
        if group.policy == admin.POLICY_TTL and group.ttl_s:
            self._remove(group.ranking.unread_since(self._clock() - group.ttl_s, keys_max))
        for kind, capacity in group.byte_limits():
            if excess := self._above(group, kind, group.used(kind), group.level(capacity)):
                self._remove(group.ranking.victims(kind, size_bytes=excess, num_keys=0, keys_max=keys_max))
        if group.max_key_count:
            level = group.max_key_count * group.used_percentage
            if excess := self._above(group, -1, group.num_keys, level):
                self._remove(group.ranking.victims(None, size_bytes=0, num_keys=excess, keys_max=keys_max))

    def _above(self, group: Group, kind: int | None, used: int, level: float) -> int:
        """How much must go now: from the level on until it is low."""
        mark, low = (group.name, kind), level * RECLAIM_LOW
        if used > level:
            self._under_way.add(mark)
        elif used <= low:
            self._under_way.discard(mark)
        return max(0, int(used - low)) if mark in self._under_way else 0


def _bytes_of(locations: list[Location], kind: int | None) -> int:
    return sum(at.size_bytes for at in locations if kind in (None, at.write.place.type))


def _excess(group: Group, write: Write) -> list[tuple[int | None, int, int]]:
    """(storage type or None for all, bytes, blocks) by which the session would pass each of the group's limits."""
    needed = sum(location.size_bytes for location in write.locations)
    limits = [(kind, capacity) for kind, capacity in group.byte_limits() if kind in (None, write.place.type)]
    excess = [(kind, group.used(kind) + needed - capacity, 0) for kind, capacity in limits]
    if group.max_key_count:
        excess.append((None, 0, group.num_keys + len(write.keys) - group.max_key_count))
    return [(kind, size_bytes, num_keys) for kind, size_bytes, num_keys in excess if size_bytes > 0 or num_keys > 0]


def _full(group: Group, num_keys: int) -> CapacityReached:
    what = f"{group.max_key_count} keys" if num_keys else "capacity in bytes"
    return CapacityReached(f"group {group.name}: the limit of its {what} is reached, and too little of it can go")
