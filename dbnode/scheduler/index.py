"""What each worker's own cache (L1) probably holds, as the router believes.

Blocks enter when a request is sent (its siblings often follow before anything is computed) and leave least recently used
first, when the worker starts anew, or when it is seen to have dropped its cache. A wrong belief costs time, never an answer.
Owned by `dbnode.scheduler.workers`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from stratakv.keys import BlockKey


class BlockIndex:
    """Keys of the blocks one worker probably holds, at most `blocks_max`."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._keys: OrderedDict[BlockKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading blocks that are held."""
        num_blocks = 0
        for key in keys:
            if key not in self._keys:
                break
            num_blocks += 1
        return num_blocks

    def add(self, keys: Sequence[BlockKey]) -> None:
        """The worker has used or is about to make these; a prefix outlives its continuation."""
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._blocks_max:
            self._keys.popitem(last=False)

    def resize(self, blocks_max: int) -> None:
        """The worker's cache turned out to hold so many."""
        self._blocks_max = blocks_max

    def clear(self) -> None:
        self._keys.clear()
