"""From one worker's events to the index of what it holds: order, gaps, restarts, trust. No I/O, no clock.

Our own workers' events are believed from the first one on. Others' are once the first block of a prompt shows that its key is
computed as ours are (algorithm, seed, block size): with other keys the index would never match. Until then, and without events,
the router goes by what it sent.
Driven by `dbnode.kv_events.subscriber`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dbnode.kv_events.wire import AllBlocksCleared, BlocksRemoved, BlocksStored, EventBatch, KvEvent
from dbnode.scheduler.index import BlockIndex, tails
from stratakv.keys import block_keys, salt_extra

OUR_ALGORITHM = "sha256_cbor"
HASH_HINT = (
    f"start vLLM with --prefix-caching-hash-algo {OUR_ALGORITHM} and without PYTHONHASHSEED in its environment;"
    " until then the router goes by what it sent"
)
GROUPS_MAX = 64


class FeedState(enum.StrEnum):
    """Whether the router goes by a worker's events."""

    WAITING = "waiting"
    """None has shown yet that its keys are ours."""
    LIVE = "live"
    REFUSED = "refused"
    """Its keys are not ours."""


class Step(enum.Enum):
    """What a live batch means."""

    APPLIED = enum.auto()
    REPEATED = enum.auto()
    GAP = enum.auto()
    """Batches before it are missing; it was not applied."""
    RESTARTED = enum.auto()
    """The publisher has begun anew; it was not applied."""


@dataclass(slots=True)
class FeedStatus:
    """For operators."""

    state: FeedState = FeedState.WAITING
    detail: str = ""
    sequence: int = -1
    """Of the last batch that was applied."""
    batches: int = 0
    gaps: int = 0
    restarts: int = 0
    resyncs: int = 0
    """How often all was forgotten, to begin anew."""


class KvFeed:
    """One worker's events on their way into its index."""

    def __init__(
        self, index: BlockIndex, block_size: int, hash_algorithm: str = "", *, has_our_keys: bool = False
    ) -> None:
        """An algorithm that is not told shows in the events; `has_our_keys` is what is known of our own workers."""
        self.status = FeedStatus()
        self._index = index
        self._block_size = block_size
        self._has_our_keys = has_our_keys
        self._at_unix_s = 0.0
        self._other_groups: set[int] = set()
        """Layers that keep only a window of a prefix: what they drop says nothing of the others."""
        if hash_algorithm not in ("", OUR_ALGORITHM):
            self.refuse(f"it computes block keys by {hash_algorithm}: {HASH_HINT}")

    @property
    def next_sequence(self) -> int:
        return self.status.sequence + 1

    def take(self, batch: EventBatch) -> Step:
        """Apply a live batch if it is the next one."""
        if batch.sequence > self.next_sequence:
            return Step.GAP
        if batch.sequence < self.next_sequence:
            return Step.RESTARTED if batch.at_unix_s > self._at_unix_s else Step.REPEATED
        self.apply(batch)
        return Step.APPLIED

    def apply(self, batch: EventBatch) -> None:
        """Take a batch as the next one."""
        self.status.sequence, self._at_unix_s = batch.sequence, batch.at_unix_s
        self.status.batches += 1
        if self._has_our_keys:
            self._go_live()
        for event in batch.events:
            self._apply(event)

    def begin_anew(self, next_sequence: int) -> None:
        """Forget what was told, and go on with this batch."""
        self._index.forget_told()
        self.status.resyncs += 1
        self.status.sequence = next_sequence - 1

    def lose(self, detail: str) -> None:
        """Events cannot be read: go by what is sent until one shows again that its keys are ours."""
        self.begin_anew(0)
        self.status.state, self.status.detail = FeedState.WAITING, detail
        self._index.doubt()

    def refuse(self, detail: str) -> None:
        """Go by what is sent, for this reason."""
        self.status.state, self.status.detail = FeedState.REFUSED, detail
        self._index.forget_told()
        self._index.doubt()

    def _apply(self, event: KvEvent) -> None:
        match event:
            case BlocksStored() if not event.is_whole_prefix:
                if event.group is not None and len(self._other_groups) < GROUPS_MAX:
                    self._other_groups.add(event.group)
            case BlocksStored():
                self._check(event)
                self._index.stored(event.tails, event.medium)
            case BlocksRemoved() if event.group not in self._other_groups:
                self._index.removed(event.tails, event.medium)
            case AllBlocksCleared():
                self._index.forget_told()

    def _check(self, event: BlocksStored) -> None:
        if self.status.state is not FeedState.WAITING or not event.is_root:
            return
        if event.block_size != self._block_size:
            self.refuse(f"its events are of blocks of {event.block_size} tokens, not {self._block_size}")
            return
        salt = event.first_extra[0] if event.first_extra else None
        if len(event.first_extra or ()) > 1 or not isinstance(salt, str | None):
            return  # images or an adapter: says nothing of our keys
        keys = block_keys(event.token_ids, event.block_size, first_block_extra=salt_extra(salt))
        if tuple(tails(keys)) == event.tails:
            self._go_live()
        elif salt is None:
            self.refuse(f"its blocks have other keys than ours: {HASH_HINT}")

    def _go_live(self) -> None:
        self.status.state, self.status.detail = FeedState.LIVE, ""
        self._index.believe()
