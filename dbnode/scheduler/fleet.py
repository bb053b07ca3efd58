"""The workers one DB node knows, and what it believes of each. No I/O: the clock is handed in, so that a simulation can use it.

Kept up to date by `dbnode.scheduler.workers` (what workers say of themselves) and by `dbnode.scheduler.planner` (what they were
sent); one `WorkerRecord` per URL.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

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


class Sent(msgspec.Struct, eq=False):
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
    sent: dict[Sent, None] = field(default_factory=dict)
    """In hand, oldest first."""
    prefilled_tokens: int = 0
    """Tokens of requests that got their first token since `load_at_s`; the load still counts them."""
    prefilled_at_s: float = 0.0
    """When one got its first token last."""
    ended_reported: int = 0
    """Requests that ended since `load_at_s`; the load still counts them."""
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
    _to_prefill: dict[Sent, None] = field(default_factory=dict)
    """Of those in hand, the ones whose prompt is not computed yet."""
    _to_prefill_tokens: int = 0
    _held_tokens: int = 0
    """Prompt tokens of all in hand."""
    _unreported: int = 0
    """Of those in hand, the ones sent since `load_at_s`."""
    _unreported_tokens: int = 0
    """To compute for these yet."""

    @property
    def usable(self) -> bool:
        return self.alive and self.facts is not None and not self.load.draining

    def send(self, sent: Sent) -> None:
        """It is about to get a request."""
        self.sent[sent] = None
        self._held_tokens += sent.prompt_tokens
        self._to_prefill[sent] = None
        self._to_prefill_tokens += sent.num_tokens
        if sent.at_s > self.load_at_s:
            self._unreported += 1
            self._unreported_tokens += sent.num_tokens

    def prefilled(self, sent: Sent, now_s: float) -> None:
        """The request's prompt is computed, which was not known before."""
        sent.prefilled = True
        self.prefilled_at_s = now_s
        del self._to_prefill[sent]
        self._to_prefill_tokens -= sent.num_tokens
        if sent.at_s > self.load_at_s:
            self._unreported_tokens -= sent.num_tokens
        else:
            self.prefilled_tokens += sent.num_tokens

    def ended(self, sent: Sent) -> None:
        """It has the request, whose prompt was computed, in hand no longer."""
        del self.sent[sent]
        self._held_tokens -= sent.prompt_tokens
        if sent.at_s > self.load_at_s:
            self._unreported -= 1
        else:
            self.ended_reported += 1

    def reported(self, load: WorkerLoad, at_s: float) -> None:
        """How busy it was at a time, with what it had been sent by then."""
        self.load, self.load_at_s = load, at_s
        self.prefilled_tokens = self.ended_reported = 0
        unreported = [sent for sent in self.sent if sent.at_s > at_s]
        self._unreported = len(unreported)
        self._unreported_tokens = sum(sent.num_tokens for sent in unreported if not sent.prefilled)

    def queued_tokens(self, now_s: float | None) -> int:
        """Prompt tokens that it has to compute yet, those just sent included, but for what it has computed by `now_s`."""
        assert self.facts is not None
        if self.facts.engine is Engine.VLLM:  # it counts requests, not the tokens it was sent from here
            told_tokens, sent_tokens = self.load.waiting_tokens, self._to_prefill_tokens
        else:
            told_tokens, sent_tokens = self.load.waiting_tokens - self.prefilled_tokens, self._unreported_tokens
        return max(0, max(0, told_tokens) + sent_tokens - self._computed_tokens(now_s))

    def candidate(self, l1_tokens: int, pool_tokens: int, now_s: float | None = None) -> Candidate:
        """What the router knows of it, with what has been sent since its last report and what it has computed by `now_s`."""
        facts, load = self.facts, self.load
        assert facts is not None
        free_tokens = None
        if facts.engine is Engine.VLLM and load.l1_blocks_total:
            free_tokens = load.l1_blocks_free * facts.block_size
        return Candidate(
            worker=facts.worker,
            url=self.url,
            role=facts.role,
            namespace=facts.namespace,
            l1_tokens=l1_tokens,
            pool_tokens=pool_tokens,
            queued_tokens=self.queued_tokens(now_s),
            running=max(0, load.running + load.waiting - self.ended_reported) + self._unreported,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_step_s=load.decode_step_s,
            pool_bytes_per_s=load.load_bytes_per_s.get("pool", 0.0),
            curves=self.curves,
            slowdown=load.slowdown,
            free_tokens=free_tokens,
            held_tokens=self._held_tokens,
            last_turn=self.last_turn,
            sent_tokens_mean=self.sent_tokens_mean,
        )

    def _computed_tokens(self, now_s: float | None) -> int:
        """How much of the oldest prompt in hand is probably computed; prompts are computed one after another."""
        head = next(iter(self._to_prefill), None)
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
        self._usable: dict[str, Sequence[WorkerRecord]] = {}
        """By model, since the last change: each request asks several times."""

    @property
    def records(self) -> list[WorkerRecord]:
        return list(self._records.values())

    def usable(self, model: str) -> Sequence[WorkerRecord]:
        """Workers that may be given a request for this model."""
        found = self._usable.get(model)
        if found is None:
            found = self._usable[model] = self._find_usable(model)
        return found

    def _find_usable(self, model: str) -> Sequence[WorkerRecord]:
        by_epoch: dict[str, WorkerRecord] = {}
        for record in self._records.values():
            if record.usable and record.facts is not None and record.facts.model == model:
                by_epoch.setdefault(record.facts.epoch, record)  # one worker may be known by two URLs
        return tuple(by_epoch.values())

    def _changed(self) -> None:
        """Other workers may be usable now."""
        self._usable.clear()

    def add(self, url: str) -> WorkerRecord:
        """A worker of which nothing is known yet."""
        record = self._records[url] = WorkerRecord(url, BlockIndex(self._settings.index_blocks_max, self._clock))
        record.heard_s = self._clock()
        self._changed()
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
        record.facts = facts
        record.reported(load, asked_s)
        record.misses, record.heard_s, record.problem = 0, self._clock(), ""
        record.alive = True
        self._changed()


def _dropped_cache(before: WorkerLoad, after: WorkerLoad) -> bool:
    """Blocks in use fell to almost none at once: what an administrator's drop looks like from outside."""
    used_before = before.l1_blocks_total - before.l1_blocks_free
    used_after = after.l1_blocks_total - after.l1_blocks_free
    return used_before >= CACHE_DROP_BLOCKS_MIN and used_after * 8 < used_before and not before.running
