"""L1 blocks that are filled before their request is there: reserved, registered when they are whole, held until it is placed.

Called from any thread by the taker of hand-overs; what it does to the cache is done on the engine's thread, between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from stratakv.keys import BlockKey
from workers.engine.connector import Tier
from workers.engine.kv_cache import KVCache

RESERVED_SHARE_MAX = 0.5
"""Of the blocks of L1: running requests must be able to grow."""


@dataclass(frozen=True, slots=True)
class HeldBlocks:
    """Blocks that are referenced for a request until it is placed, and where their KV came from."""

    blocks: Sequence[int] = ()
    tiers: Sequence[Tier] = ()


class Reservations:
    """`post` has something done on the engine's thread, where `is_crowded` tells whether requests wait for room."""

    def __init__(
        self, cache: KVCache, post: Callable[[Callable[[], None]], None], is_crowded: Callable[[], bool]
    ) -> None:
        self._cache = cache
        self._post = post
        self._is_crowded = is_crowded
        self._num_reserved = 0

    def reserve(self, num_blocks: int) -> Future[list[int]]:
        """So many referenced blocks; none if there is no room for all of them."""
        reserved: Future[list[int]] = Future()
        self._post(lambda: reserved.set_result(self._reserve(num_blocks)))
        return reserved

    def register(self, keys: Sequence[BlockKey], blocks: Sequence[int]) -> Future[None]:
        """Let reserved blocks, which are whole now, be found by their keys."""
        done: Future[None] = Future()

        def register() -> None:
            for key, block in zip(keys, blocks, strict=True):
                self._cache.register(key, block)
            done.set_result(None)

        self._post(register)
        return done

    def release(self, blocks: Sequence[int]) -> None:
        """Nobody holds these reserved blocks any more; those that were registered stay cached as long as there is room."""
        if blocks:
            self._post(lambda: self.released(blocks))

    def released(self, blocks: Sequence[int]) -> None:
        """`release`, on the engine's thread."""
        self._cache.release(blocks)
        self._num_reserved -= len(blocks)

    def _reserve(self, num_blocks: int) -> list[int]:
        room = int(self._cache.num_blocks * RESERVED_SHARE_MAX) - self._num_reserved
        has_room = num_blocks <= room and not self._is_crowded()
        blocks = self._cache.allocate(num_blocks, None) if has_room else None
        self._num_reserved += len(blocks or ())
        return blocks or []
