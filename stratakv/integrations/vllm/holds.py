"""Keeps blocks of windows from being used again while they are saved: vLLM frees them as soon as no later token reads them.

In the scheduler only. A hold counts as one more user of its blocks; it ends when every worker has said that its save is over.
Blocks of requests that are held to their end need none.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

HELD_SHARE_MAX = 0.5
"""Of all blocks; what would go beyond is not saved."""


class EngineBlock(Protocol):
    """`KVCacheBlock` of vLLM."""

    block_id: int
    is_null: bool


class EngineBlockPool(Protocol):
    """`BlockPool` of vLLM."""

    num_gpu_blocks: int

    def touch(self, blocks: Sequence[EngineBlock]) -> None:
        """Count one more user."""

    def free_blocks(self, ordered_blocks: Iterable[EngineBlock]) -> None:
        """Count one user fewer."""


class EngineBlocks(Protocol):
    """`KVCacheBlocks` of vLLM."""

    blocks: Sequence[Sequence[EngineBlock]]


class EngineCache(Protocol):
    """`KVCacheManager` of vLLM."""

    block_pool: EngineBlockPool

    def get_blocks(self, request_id: str) -> EngineBlocks:
        """The request's block tables, one a group; blocks that were given up are null."""


@dataclass(frozen=True, slots=True)
class Held:
    """Blocks that are held, by their indexes in the request's table."""

    number: int
    indexes: Sequence[int]
    blocks: Sequence[int]


@dataclass(slots=True)
class Holds:
    """Those of one engine."""

    cache: EngineCache
    num_workers: int
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _held: dict[int, Sequence[EngineBlock]] = field(default_factory=dict)
    _told: Counter[int] = field(default_factory=Counter)
    _num_blocks: int = 0

    def take(self, request_id: str, group: int, start: int, stop: int) -> Held | None:
        """Blocks `start` … `stop` - 1 of a group as far as the request still has them; None if there is none to hold."""
        table = self.cache.get_blocks(request_id).blocks[group]
        indexes = [n for n in range(start, min(stop, len(table))) if not table[n].is_null]
        room = int(self.cache.block_pool.num_gpu_blocks * HELD_SHARE_MAX) - self._num_blocks
        if not indexes or len(indexes) > room:
            return None
        blocks = [table[n] for n in indexes]
        self.cache.block_pool.touch(blocks)
        self._num_blocks += len(blocks)
        number = next(self._numbers)
        self._held[number] = blocks
        return Held(number, indexes, [block.block_id for block in blocks])

    def over(self, told: Mapping[int, int]) -> None:
        """So many workers have said of these that their saves are over."""
        self._told.update(told)
        for number in [number for number in told if self._told[number] >= self.num_workers]:
            del self._told[number]
            blocks = self._held.pop(number)
            self._num_blocks -= len(blocks)
            self.cache.block_pool.free_blocks(reversed(blocks))
