"""Lookups of how much of a prompt the pool holds, one per request.

The scheduler must not wait, so a lookup is under way between its steps. What is found is pinned by leases, which belong to the
lookup until they are handed to a load order or released.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from stratakv.integrations.link import PoolLink
from stratakv.integrations.vllm.groups import KVGroups
from stratakv.integrations.vllm.orders import Rank, RankHit, RankSpec
from stratakv.integrations.vllm.prefix_search import LEASE_S, NOTHING, Answer, PrefixSearch
from stratakv.keys import BlockKey
from stratakv.wire import ReleaseLease

ANSWER_VALID_S = LEASE_S / 2
"""A request that is scheduled later than that asks again: its lease must outlast the load."""
WAIT_S = 0.002
"""An answer usually comes within this time, which is cheaper to wait than one more turn of the scheduler."""


@dataclass(slots=True)
class Lookup:
    """One question."""

    first_step: int
    keys: Sequence[Sequence[BlockKey]]
    """By group: of the blocks from there on."""
    asked_at: float
    deadline: float
    _future: Future[Answer]
    _release: ReleaseHits
    _is_over: bool = False

    def answer(self) -> Answer | None:
        """None while the question is under way and may still be answered in time."""
        if not self._future.done() and time.monotonic() < self.deadline:
            try:
                return self._future.result(WAIT_S)
            except TimeoutError:
                return None
        if not self._future.done():
            self.give_up()
            return NOTHING
        return NOTHING if self._is_over else self._future.result()

    @property
    def is_stale(self) -> bool:
        """Whether its leases may end before a load that begins now."""
        return time.monotonic() - self.asked_at > ANSWER_VALID_S

    def hand_over(self) -> None:
        """The leases are somebody else's now."""
        self._is_over = True

    def give_up(self) -> None:
        """Release what was found, or will be. Safe to call more than once."""
        if not self._is_over:
            self._is_over = True
            self._future.add_done_callback(self._release)


@dataclass(frozen=True, slots=True)
class ReleaseHits:
    """Gives the leases of an answer back."""

    link: PoolLink

    def __call__(self, answered: Future[Answer]) -> None:
        if answered.cancelled() or answered.exception() is not None:
            return
        release(self.link, answered.result().hits)


def release(link: PoolLink, hits: Iterable[tuple[Rank, RankHit]]) -> None:
    """Give the leases of these hits back."""
    for _, hit in hits:
        if hit.lease_id:
            link.tell(ReleaseLease(hit.lease_id))


@dataclass(slots=True)
class Lookups:
    """Starts lookups in the namespaces of all ranks."""

    link: PoolLink
    specs: Mapping[Rank, RankSpec]
    groups: KVGroups
    timeout_s: float
    asked: int = field(default=0)

    def start(self, first_step: int, stop_step: int, keys: Sequence[BlockKey]) -> Lookup:
        """Ask for steps `first_step` … `stop_step` - 1 of the prefix that has these keys."""
        self.asked += 1
        now = time.monotonic()
        step_tokens = self.groups.step_tokens
        by_group = []
        for group in self.groups.groups:
            start, stop = (step * step_tokens // group.block_size for step in (first_step, stop_step))
            by_group.append(self.groups.keys_of(group, keys, start, stop))
        search = PrefixSearch(self.link.meta, self.specs, self.groups, first_step, by_group, self.timeout_s)
        return Lookup(
            first_step, by_group, now, now + self.timeout_s, self.link.submit(search.run()), ReleaseHits(self.link)
        )
