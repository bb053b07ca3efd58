"""Loads from the tiers below for requests that still wait for their turn, so that no step has to wait for them later.

Owned by the scheduler, on the engine's thread. Only what is nobody else's is used: blocks that would be left over if all requests
before it in the queue were placed. Whoever needs blocks meanwhile takes these back first (`drop_last`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Blocks
from dataclasses import dataclass
from itertools import islice

from stratakv.errors import StrataError
from stratakv.keys import BlockKey
from stratakv.log import EventLogger
from workers.engine.connector import LoadJob
from workers.engine.kv_cache import KVCache
from workers.engine.sequence import Sequence

_log = EventLogger(__name__)
_GROWTH_BLOCKS = 32
"""Kept free behind the loaded ones for the rest of the prompt, where there is room elsewhere."""


@dataclass(slots=True, eq=False)
class LoadAhead:
    """Of one waiting request; all of its blocks are referenced."""

    matched: Blocks[int]
    """What L1 had of the prompt."""
    blocks: Blocks[int]
    """Those behind, which are loaded."""
    job: LoadJob


class LoadsAhead:
    """Of requests at the head of the queue: at most `requests_max`, and so many bytes."""

    def __init__(self, cache: KVCache, requests_max: int, bytes_max: int) -> None:
        self._cache = cache
        self._requests_max = requests_max
        self._blocks_max = bytes_max // cache.block_bytes
        self._loads: dict[Sequence, LoadAhead] = {}
        self.num_used = 0
        """Blocks that were there, or on their way, when their request's turn came."""
        self.num_dropped = 0
        """Blocks that were given up: the request ended, or others needed the room."""

    def begin(
        self,
        waiting: Iterable[Sequence],
        match: Callable[[Sequence], list[int]],
        promised: Callable[[], set[BlockKey]],
        num_spare: int,
    ) -> None:
        """Start loads for `waiting`, in their order. `num_spare` blocks are left to those that run, who compute `promised`."""
        head = list(islice(waiting, self._requests_max))
        if all(sequence.external is None or sequence in self._loads for sequence in head):
            return
        taken_keys, needed = promised(), num_spare
        looked_at: list[int] = []
        for sequence in head:
            matched = match(sequence)
            self._cache.reference(matched)  # what is started next must not evict it
            looked_at += matched
            needed += sequence.num_blocks - len(matched)
            if needed > self._cache.num_available + self._num_held(sequence):
                break
            if sequence not in self._loads:
                self._start(sequence, matched, taken_keys)
            needed -= self._num_held(sequence)
            taken_keys.update(sequence.keys)
        self._cache.release(looked_at)

    def of(self, sequence: Sequence) -> LoadAhead | None:
        return self._loads.get(sequence)

    def use(self, sequence: Sequence) -> None:
        """Its turn has come: the blocks and the job are its own."""
        load = self._loads.pop(sequence)
        self._cache.release(load.matched)
        self.num_used += len(load.blocks)

    def drop(self, sequence: Sequence) -> None:
        """Stop its load, if there is one, and give the blocks back."""
        load = self._loads.pop(sequence, None)
        if load is not None:
            load.job.cancel()
            self._cache.release([*load.matched, *load.blocks])
            self.num_dropped += len(load.blocks)

    def drop_last(self, waiting: Blocks[Sequence], before: Sequence | None = None) -> bool:
        """Make room by dropping the one whose turn comes last, and after that of `before`; False if there is none."""
        for sequence in reversed(waiting) if self._loads else ():
            if sequence is before:
                break
            if sequence in self._loads:
                self.drop(sequence)
                return True
        return False

    def _num_held(self, sequence: Sequence) -> int:
        load = self._loads.get(sequence)
        return len(load.blocks) if load is not None else 0

    def _start(self, sequence: Sequence, matched: list[int], taken_keys: set[BlockKey]) -> None:
        first = len(matched)
        num_blocks = len(sequence.tiers_below(first))
        num_held = sum(len(load.blocks) for load in self._loads.values())
        if not num_blocks or num_held + num_blocks > self._blocks_max or len(self._loads) >= self._requests_max:
            return
        if sequence.keys[first] in taken_keys:
            return  # somebody before it will have computed or loaded that
        growth = min(sequence.num_blocks - first - num_blocks, _GROWTH_BLOCKS)
        blocks = self._cache.allocate(num_blocks, matched[-1] if matched else None, growth)
        assert blocks is not None
        assert sequence.external is not None
        try:
            job = sequence.external.load_ahead(first, blocks)
        except StrataError as error:
            _log.debug("load_ahead_refused", reason=error.code, num_blocks=num_blocks)
            self._cache.release(blocks)
            sequence.release_external()
            return
        self._cache.reference(matched)
        self._loads[sequence] = LoadAhead(matched, blocks, job)
