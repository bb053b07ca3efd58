"""L1: the paged KV cache of one engine, with its prefix cache.

A block is free, referenced (by sequences, or by a write-down that has not finished), or cached: unreferenced, but found by
its prefix key until it is evicted, least recently used first. One engine serves one namespace, so keys need no scope here.
Owned by the engine's thread; `num_cached`, `keys`, `use` and the counts of what was evicted may be read from any thread.
"""

from __future__ import annotations

import itertools
import math
import mmap
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stratakv.keys import BlockKey
from workers.engine.errors import CacheCorrupt
from workers.engine.free_blocks import FreeBlocks
from workers.engine.journal import BlockJournal
from workers.engine.model_config import ModelFacts


@dataclass(frozen=True, slots=True)
class CacheUse:
    """How many blocks are in which state."""

    total: int
    free: int
    cached: int
    """Unreferenced and found by key."""
    referenced: int

    @property
    def available(self) -> int:
        return self.free + self.cached


class KVCache:
    """K and V tensors of all layers, and the books about their blocks."""

    def __init__(
        self,
        facts: ModelFacts,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        shape = (num_blocks, block_size, facts.num_kv_heads, facts.head_dim)
        dtype = facts.dtype.torch_dtype
        self.k = [_zeros(shape, dtype, device) for _ in range(facts.num_layers)]
        self.v = [_zeros(shape, dtype, device) for _ in range(facts.num_layers)]
        self._clock = clock
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._free = FreeBlocks(num_blocks)
        self._block_of: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}
        self._unreferenced: OrderedDict[int, float] = OrderedDict()
        """Cached blocks nobody references and since when, the next to evict first."""
        self.num_evicted = 0
        """For want of room."""
        self.evicted_age_s = 0.0
        """Sum of the times for which nobody had referenced those."""
        self.journal: BlockJournal | None = None
        """Set before the engine starts, by whoever takes from it."""

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """Blocks of the longest cached prefix of `keys`."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_cached(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys are cached, at this moment. Any thread."""
        return len(self.match(keys))

    def keys(self) -> list[BlockKey]:
        """All that are cached, at this moment. Any thread."""
        return list(self._block_of)

    def reference(self, blocks: Sequence[int]) -> None:
        """Keep `blocks` from being evicted until as many `release`s."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._unreferenced[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Undo one reference of each. The last of them is the first to be evicted: prefixes outlive their continuations."""
        now = self._clock()
        for block in reversed(blocks):
            if self._refs[block] < 1:
                raise CacheCorrupt(f"block {block} is released more often than referenced")
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            self._free.end_growth(block)
            if block in self._key_of:
                self._unreferenced[block] = now
            else:
                self._free.add(block)

    def allocate(self, num_blocks: int, after: int | None, expected_growth: int = 0) -> list[int] | None:
        """Referenced blocks for new tokens, consecutive and following block `after` where possible; None if too few.

        `expected_growth` blocks behind them are avoided by others as long as there is room elsewhere.
        """
        missing = num_blocks - len(self._free)
        if missing > len(self._unreferenced):
            return None
        if missing > 0:
            self._make_room(missing)
        blocks = self._free.take(num_blocks, after, expected_growth)
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def register(self, key: BlockKey, block: int) -> None:
        """Let a referenced, fully written block be found by its key. A key that is already cached keeps its block."""
        if self._refs[block] < 1:
            raise CacheCorrupt(f"block {block} is registered without a reference")
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key
            if self.journal is not None:
                self.journal.added(key)

    def drop_unreferenced(self) -> int:
        """Forget every cached block that nobody references; how many."""
        blocks = list(self._unreferenced)
        for block in blocks:
            self._evict(block)
        return len(blocks)

    @property
    def use(self) -> CacheUse:
        free, cached = len(self._free), len(self._unreferenced)
        return CacheUse(self.num_blocks, free, cached, self.num_blocks - free - cached)

    @property
    def block_bytes(self) -> int:
        """Of all layers."""
        return sum(tensor.nbytes for tensor in (*self.k, *self.v)) // self.num_blocks

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._unreferenced)

    def check(self) -> None:
        """Raises CacheCorrupt unless every block is in exactly one state and the two key tables agree."""
        for block, refs in enumerate(self._refs):
            states = (refs > 0) + (block in self._free) + (block in self._unreferenced)
            if refs < 0 or states != 1:
                raise CacheCorrupt(f"block {block} with {refs} references is in {states} states")
            if block in self._unreferenced and block not in self._key_of:
                raise CacheCorrupt(f"block {block} is kept without a key")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise CacheCorrupt("the tables of keys and blocks differ")

    def _make_room(self, num_blocks: int) -> None:
        now = self._clock()
        for block, since in list(itertools.islice(self._unreferenced.items(), num_blocks)):
            self.evicted_age_s += now - since
            self._evict(block)
        self.num_evicted += num_blocks

    def _evict(self, block: int) -> None:
        del self._unreferenced[block]
        key = self._key_of.pop(block)
        del self._block_of[key]
        if self.journal is not None:
            self.journal.removed(key)
        self._free.add(block)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory is really there: faulting a page in costs more than the load that fills it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape).zero_()
