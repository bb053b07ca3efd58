"""The workers one DB node knows, and what it believes of each. No I/O: the clock is handed in, so that a simulation can use it.

Kept up to date by `dbnode.scheduler.workers` (what workers say of themselves) and by `dbnode.scheduler.planner` (what they were
sent); one `WorkerRecord` per URL.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dbnode.kv_events.feed import FeedStatus
from dbnode.scheduler.cost import Candidate
from dbnode.scheduler.index import BlockIndex
from dbnode.worker_messages import Engine, WorkerFacts
from stratakv.keys import BlockKey
from stratakv.log import EventLogger
from stratakv.settings import RouterSettings
from stratakv.wire import WorkerLoad
from stratakv.worker_profile import Curves

log = EventLogger("dbnode.workers")

CACHE_DROP_BLOCKS_MIN = 16
MEAN_WEIGHT = 1 / 16
"""Of the newest request in a worker's running mean."""


@dataclass(slots=True)
class Sent:
    """A request that a worker has in hand."""

    at_s: float
    num_tokens: int
    """Prompt tokens it has to compute."""
    prompt_tokens: int = 0
    abort: Callable[[], None] | None = None
    prefilled: bool = False
    keys: Sequence[BlockKey] = ()


@dataclass(slots=True)
class WorkerRecord:
    """One worker."""

    url: str
    index: BlockIndex
    facts: WorkerFacts | None = None
    curves: Curves | None = None
    load: WorkerLoad = WorkerLoad()
    load_at_s: float = 0.0
    alive: bool = False
    misses: int = 0
    heard_s: float = 0.0
    sent: list[Sent] = field(default_factory=list)
    prefilled_tokens: int = 0
    """Tokens of requests that got their first token since `load_at_s`; the load still counts them."""
    prefilled_at_s: float = 0.0
    """When one got its first token last."""
    ended: int = 0
    """Requests that ended since `load_at_s`."""
    last_turn: int = 0
    """Which of all requests it was sent last; 0: none yet."""
    sent_tokens_mean: float = 0.0
    """Running mean of the tokens it had to compute for one request."""
    probe: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to be polled at once."""
    problem: str = ""
    """Why it is not alive, as far as is known."""
    events: FeedStatus | None = None
    """Of a worker that tells what it holds."""
    listener: asyncio.Task[None] | None = None

    @property
    def usable(self) -> bool:
        return self.alive and self.facts is not None and not self.load.draining

    def candidate(self, l1_tokens: int, pool_tokens: int, now_s: float | None = None) -> Candidate:
        """What the router knows of it, with what has been sent since its last report and what it has computed by `now_s`."""
        assert self.facts is not None
        unreported = [sent for sent in self.sent if sent.at_s > self.load_at_s]
        uncounted = unreported
        queued_tokens = max(0, self.load.waiting_tokens - self.prefilled_tokens)
        free_tokens = None
        if self.facts.engine is Engine.VLLM:  # it counts requests, not the tokens it was sent from here
            uncounted, queued_tokens = self.sent, self.load.waiting_tokens
            free_tokens = self.load.l1_blocks_free * self.facts.block_size if self.load.l1_blocks_total else None
        queued_tokens += sum(sent.num_tokens for sent in uncounted if not sent.prefilled)
        return Candidate(
            worker=self.facts.worker,
            url=self.url,
            role=self.facts.role,
            namespace=self.facts.namespace,
            l1_tokens=l1_tokens,
            pool_tokens=pool_tokens,
            queued_tokens=max(0, queued_tokens - self._computed_tokens(now_s)),
            running=max(0, self.load.running + self.load.waiting - self.ended) + len(unreported),
            prefill_tokens_per_s=self.load.prefill_tokens_per_s,
            decode_step_s=self.load.decode_step_s,
            pool_bytes_per_s=self.load.load_bytes_per_s.get("pool", 0.0),
            curves=self.curves,
            slowdown=self.load.slowdown,
            free_tokens=free_tokens,
            held_tokens=sum(sent.prompt_tokens for sent in self.sent),
            last_turn=self.last_turn,
            sent_tokens_mean=self.sent_tokens_mean,
        )

    def _computed_tokens(self, now_s: float | None) -> int:
        """How much of the oldest prompt in hand is probably computed; prompts are computed one after another."""
        head = next((sent for sent in self.sent if not sent.prefilled), None)
        if head is None or now_s is None:
            return 0
        since_s = max(head.at_s, self.prefilled_at_s)
        return min(head.num_tokens, int((now_s - since_s) * self.load.prefill_tokens_per_s))


class Fleet:
    """All known workers."""

    def __init__(self, settings: RouterSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._records: dict[str, WorkerRecord] = {}

    @property
    def records(self) -> list[WorkerRecord]:
        return list(self._records.values())

    def usable(self, model: str) -> list[WorkerRecord]:
        """Workers that may be given a request for this model."""
        by_epoch: dict[str, WorkerRecord] = {}
        for record in self._records.values():
            if record.usable and record.facts is not None and record.facts.model == model:
                by_epoch.setdefault(record.facts.epoch, record)  # one worker may be known by two URLs
        return list(by_epoch.values())

    def add(self, url: str) -> WorkerRecord:
        """A worker of which nothing is known yet."""
        record = self._records[url] = WorkerRecord(url, BlockIndex(self._settings.index_blocks_max, self._clock))
        record.heard_s = self._clock()
        return record

    def heard(self, record: WorkerRecord, facts: WorkerFacts, load: WorkerLoad, asked_s: float) -> None:
        """Take in what a worker says of itself, as of `asked_s`."""
        if record.facts is None or record.facts.epoch != facts.epoch:
            record.index.reset()
        elif facts.engine is Engine.STRATAKV and _dropped_cache(record.load, load):
            log.info("worker_dropped_cache", worker=facts.worker)
            record.index.clear()
        if load.l1_blocks_total:
            record.index.resize(min(load.l1_blocks_total, self._settings.index_blocks_max))
        if record.facts is None or record.facts.profile != facts.profile:
            record.curves = Curves(facts.profile)
        record.facts, record.load, record.load_at_s = facts, load, asked_s
        record.misses, record.heard_s, record.problem = 0, self._clock(), ""
        record.prefilled_tokens = record.ended = 0
        record.alive = True


def _dropped_cache(before: WorkerLoad, after: WorkerLoad) -> bool:
    """Blocks in use fell to almost none at once: what an administrator's drop looks like from outside."""
    used_before = before.l1_blocks_total - before.l1_blocks_free
    used_after = after.l1_blocks_total - after.l1_blocks_free
    return used_before >= CACHE_DROP_BLOCKS_MIN and used_after * 8 < used_before and not before.running
