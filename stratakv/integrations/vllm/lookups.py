"""Asks the meta server how much of a prompt the pool holds: one message per rank, all at once, and once per request.

The scheduler must not wait, so a lookup is under way between its steps. What is found is pinned by a lease, which belongs to the
lookup until it is handed to a load order or released.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from stratakv.errors import StrataError
from stratakv.integrations.link import PoolLink
from stratakv.integrations.vllm.orders import Rank, RankHit, RankSpec
from stratakv.keys import BlockKey, pack_keys
from stratakv.log import EventLogger
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import Match, MatchPrefix, ReleaseLease

log = EventLogger("stratakv.vllm.lookups")

LEASE_S = 30.0
"""How long what was found stays where it is."""
ANSWER_VALID_S = LEASE_S / 2
"""A request that is scheduled later than that asks again: its lease must outlast the load."""
WAIT_S = 0.002
"""An answer usually comes within this time, which is cheaper to wait than one more turn of the scheduler."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What every rank has of some consecutive blocks."""

    num_blocks: int
    hits: Mapping[Rank, RankHit]


NOTHING = Answer(0, {})


@dataclass(slots=True)
class Lookup:
    """One question."""

    first_block: int
    keys: Sequence[BlockKey]
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


def release(link: PoolLink, hits: Mapping[Rank, RankHit]) -> None:
    """Give the leases of these hits back."""
    for hit in hits.values():
        if hit.lease_id:
            link.tell(ReleaseLease(hit.lease_id))


@dataclass(slots=True)
class Lookups:
    """Starts lookups in the namespaces of all ranks."""

    link: PoolLink
    specs: Mapping[Rank, RankSpec]
    timeout_s: float
    asked: int = field(default=0)

    def start(self, first_block: int, keys: Sequence[BlockKey]) -> Lookup:
        """Ask for blocks `first_block` … with these keys."""
        self.asked += 1
        now = time.monotonic()
        future = self.link.submit(self._ask(pack_keys(keys)))
        return Lookup(first_block, keys, now, now + self.timeout_s, future, ReleaseHits(self.link))

    async def _ask(self, keys: bytes) -> Answer:
        meta = self.link.meta
        matches = await asyncio.gather(*(self._match(meta, spec, keys) for spec in self.specs.values()))
        num_blocks = min(match.num_blocks for match in matches)
        hits = {
            rank: RankHit(match.places()[:num_blocks], match.segments, match.lease_id)
            for rank, match in zip(self.specs, matches, strict=True)
        }
        return Answer(num_blocks, hits)

    async def _match(self, meta: MetaClient, spec: RankSpec, keys: bytes) -> Match:
        try:
            return await meta.call(
                MatchPrefix(spec.namespace, keys, LEASE_S, spec.node or ""), Match, timeout_s=self.timeout_s
            )
        except StrataError as error:
            log.debug("lookup_failed", error=error.message)
            return Match(0)
