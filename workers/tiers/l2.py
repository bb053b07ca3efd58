"""L2: what this worker knows to lie in its own host's segment. A table of places; the bytes are the daemon's.

Used from the event loop only. Entries are hints: a page that was evicted since fails its header and is a miss.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from stratakv.keys import BlockKey
from stratakv.wire import Place, Segment


class L2Table:
    """Key → place on the local segment, least recently used entries dropped beyond `entries_max`."""

    def __init__(self, entries_max: int) -> None:
        self._entries_max = entries_max
        self._segment: Segment | None = None
        self._places: OrderedDict[BlockKey, Place] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, segment: Segment, entries: Iterable[tuple[BlockKey, Place]]) -> None:
        """Remember pages of the local segment; those of another epoch are forgotten."""
        if self._segment is None or self._segment.epoch != segment.epoch:
            self._places.clear()
            self._segment = segment
        for key, place in entries:
            self._places[key] = place
            self._places.move_to_end(key)
        while len(self._places) > self._entries_max:
            self._places.popitem(last=False)

    def match(self, keys: Sequence[BlockKey]) -> tuple[Segment | None, list[Place]]:
        """Places of the longest known prefix of `keys`."""
        places: list[Place] = []
        for key in keys:
            place = self._places.get(key)
            if place is None:
                break
            self._places.move_to_end(key)
            places.append(place)
        return self._segment, places

    def forget(self, key: BlockKey) -> None:
        """One page turned out bad."""
        self._places.pop(key, None)

    def clear(self) -> int:
        """Forget everything; how many entries there were."""
        count = len(self._places)
        self._places.clear()
        return count
