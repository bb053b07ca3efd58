"""The caches of a simulated fleet: each worker's L1, and the pool that all share. Least recently used blocks leave first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from stratakv.keys import BlockKey


class LruBlocks:
    """At most `blocks_max` blocks; 0 is no limit."""

    def __init__(self, blocks_max: int = 0) -> None:
        self._blocks_max = blocks_max
        self._blocks: OrderedDict[BlockKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading blocks that are there."""
        blocks = self._blocks
        for num_blocks, key in enumerate(keys):
            if key not in blocks:
                return num_blocks
        return len(keys)

    def use(self, keys: Sequence[BlockKey]) -> tuple[list[BlockKey], list[BlockKey]]:
        """Keep these, as the most recently used; a prefix outlives its continuation. What was added, and what left."""
        blocks = self._blocks
        added = []
        for key in reversed(keys):
            if key in blocks:
                blocks.move_to_end(key)
            else:
                blocks[key] = None
                added.append(key)
        left = []
        while self._blocks_max and len(blocks) > self._blocks_max:
            left.append(blocks.popitem(last=False)[0])
        return added, left


def infinite_hit_tokens(prompts: Sequence[Sequence[BlockKey]], block_tokens: int) -> int:
    """Tokens that one cache without bounds would have, if prompts came one after another."""
    cache = LruBlocks()
    hits = 0
    for keys in prompts:
        hits += cache.match(keys) * block_tokens
        cache.use(keys)
    return hits
