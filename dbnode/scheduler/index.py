"""What each worker's own cache probably holds, as the router believes.

Two sources. What was sent: blocks enter when a request is sent (its siblings often follow before anything is computed) and leave
least recently used first, when the worker starts anew, or when it is seen to have dropped its cache. And what the worker
tells (`dbnode.kv_events`): then that is what counts, and what was sent is believed only until the events about it must have
come. A wrong belief costs time, never an answer. Owned by `dbnode.scheduler.workers`.

Blocks are known by the end of their keys, since that is all that events carry.
"""

from __future__ import annotations

import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NewType

from stratakv.keys import BlockKey

KeyTail = NewType("KeyTail", bytes)
"""Last 8 bytes of a block's key."""
TAIL_BYTES = 8

EVENTS_LAG_S = 5.0
"""Events about what a worker has computed come within so long."""


class Medium(enum.IntFlag):
    """Where a worker holds a block."""

    DEVICE = 1
    HOST = 2
    STORAGE = 4


def tails(keys: Iterable[BlockKey]) -> list[KeyTail]:
    return [KeyTail(key[-TAIL_BYTES:]) for key in keys]


class BlockIndex:
    """Keys of the blocks one worker probably holds, at most `blocks_max` of each source."""

    def __init__(self, blocks_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._blocks_max = blocks_max
        self._sent_max = blocks_max
        self._clock = clock
        self._sent: OrderedDict[KeyTail, float] = OrderedDict()
        """Until when each is believed, where the worker tells of its blocks."""
        self._told: OrderedDict[KeyTail, int] = OrderedDict()
        """The media of each, as plain numbers: thousands are looked up for one prompt."""
        self.is_told = False
        """Whether the worker's own word counts."""
        self.holds_below = False
        """Whether it has told of blocks anywhere but in device memory."""

    def __len__(self) -> int:
        return len(self._told) if self.is_told else len(self._sent)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading blocks that are held in device memory."""
        return self._match(keys, Medium.DEVICE)

    def match_below(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading blocks that the worker holds anywhere, so that it need not compute them."""
        return self._match(keys, Medium.DEVICE | Medium.HOST | Medium.STORAGE)

    def _match(self, keys: Sequence[BlockKey], media: Medium) -> int:
        told: Callable[[bytes, int], int] = self._told.get  # type: ignore[assignment]
        sent: Callable[[bytes, float], float] = self._sent.get  # type: ignore[assignment]
        is_told, wanted = self.is_told, int(media)
        now_s = self._clock() if is_told else 0.0
        for num_blocks, key in enumerate(keys):
            tail = key[-TAIL_BYTES:]
            if not (is_told and told(tail, 0) & wanted) and sent(tail, -1.0) < now_s:
                return num_blocks
        return len(keys)

    def add(self, keys: Sequence[BlockKey], for_s: float = EVENTS_LAG_S) -> None:
        """The worker has used or is about to make these; a prefix outlives its continuation.

        If the worker tells of its blocks, they are believed for so long without its word.
        """
        until_s = self._clock() + for_s
        for key in reversed(keys):
            tail = KeyTail(key[-TAIL_BYTES:])
            self._sent[tail] = until_s
            self._sent.move_to_end(tail)
        while len(self._sent) > self._sent_max:
            self._sent.popitem(last=False)

    def resize(self, blocks_max: int) -> None:
        """The worker's cache turned out to hold so many."""
        self._sent_max = blocks_max

    def clear(self) -> None:
        """The worker dropped what it had, and tells so itself if it tells of its blocks."""
        self._sent.clear()

    def reset(self) -> None:
        """Another process is there now; nothing is known of it."""
        self._sent.clear()
        self.forget_told()
        self.is_told = False

    def believe(self) -> None:
        """From now on the worker's own word counts."""
        self.is_told = True

    def doubt(self) -> None:
        """From now on it counts no longer."""
        self.is_told = False

    def stored(self, stored: Iterable[KeyTail], medium: Medium) -> None:
        """The worker tells that it holds these."""
        added = int(medium)
        self.holds_below = self.holds_below or medium is not Medium.DEVICE
        for tail in stored:
            self._told[tail] = self._told.get(tail, 0) | added
            self._told.move_to_end(tail)
        while len(self._told) > self._blocks_max:
            self._told.popitem(last=False)

    def removed(self, removed: Iterable[KeyTail], medium: Medium) -> None:
        """The worker tells that it holds these no longer."""
        kept = ~int(medium)
        for tail in removed:
            media = self._told.get(tail)
            if media is None:
                continue
            if media & kept:
                self._told[tail] = media & kept
            else:
                del self._told[tail]

    def forget_told(self) -> None:
        """What the worker told is gone, or events were missed."""
        self._told.clear()
        self.holds_below = False
