"""The workers this DB node knows: who they are, whether they live, how busy they are, what they hold.

URLs come from the settings and from the meta server; each is asked for its facts and its load every `refresh_s`. A refused
connection is believed at once, silence after two polls; a worker that has been silent for long loses the requests it has in
hand, so that they can go on elsewhere. A worker that publishes KV events is listened to as long as it is known. One
`WorkerRecord` per URL, changed only here and by `Scheduler`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dbnode.errors import WorkerUnreachable
from dbnode.kv_events.feed import FeedStatus, KvFeed
from dbnode.kv_events.subscriber import KvSubscriber
from dbnode.scheduler.cost import Candidate
from dbnode.scheduler.index import BlockIndex
from dbnode.scheduler.pool_view import PoolView
from dbnode.worker_base import WorkerDoor
from dbnode.worker_messages import Engine, WorkerFacts
from stratakv.keys import BlockKey
from stratakv.log import EventLogger
from stratakv.settings import RouterSettings
from stratakv.wire import WorkerLoad
from stratakv.worker_address import worker_url

log = EventLogger("dbnode.workers")

PROBE_TIMEOUT_S = 2.0
MISSES_MAX = 2
"""Unanswered polls after which a worker gets no new requests."""
SILENT_S_MAX = 10.0
"""A worker that has said nothing for so long loses what it has in hand."""
FORGET_S = 60.0
"""A worker that nobody lists any more and that does not answer is forgotten."""
WORKERS_MAX = 1024
CACHE_DROP_BLOCKS_MIN = 16


@dataclass(slots=True)
class Sent:
    """A request that a worker has in hand."""

    at_s: float
    num_tokens: int
    """Prompt tokens it has to compute."""
    abort: Callable[[], None] | None = None
    prefilled: bool = False
    keys: Sequence[BlockKey] = ()


@dataclass(slots=True)
class WorkerRecord:
    """One worker."""

    url: str
    index: BlockIndex
    facts: WorkerFacts | None = None
    load: WorkerLoad = WorkerLoad()
    load_at_s: float = 0.0
    alive: bool = False
    misses: int = 0
    heard_s: float = 0.0
    sent: list[Sent] = field(default_factory=list)
    prefilled_tokens: int = 0
    """Tokens of requests that got their first token since `load_at_s`; the load still counts them."""
    ended: int = 0
    """Requests that ended since `load_at_s`."""
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

    def candidate(self, l1_tokens: int, pool_tokens: int) -> Candidate:
        """What the router knows of it, with what has been sent since its last report."""
        assert self.facts is not None
        unreported = [sent for sent in self.sent if sent.at_s > self.load_at_s]
        uncounted = unreported
        queued_tokens = max(0, self.load.waiting_tokens - self.prefilled_tokens)
        free_tokens = None
        if self.facts.engine is Engine.VLLM:  # it counts requests, not the tokens it was sent from here
            uncounted, queued_tokens = self.sent, self.load.waiting_tokens
            free_tokens = self.load.l1_blocks_free * self.facts.block_size if self.load.l1_blocks_total else None
        return Candidate(
            worker=self.facts.worker,
            url=self.url,
            role=self.facts.role,
            namespace=self.facts.namespace,
            l1_tokens=l1_tokens,
            pool_tokens=pool_tokens,
            queued_tokens=queued_tokens + sum(sent.num_tokens for sent in uncounted if not sent.prefilled),
            running=max(0, self.load.running + self.load.waiting - self.ended) + len(unreported),
            prefill_tokens_per_s=self.load.prefill_tokens_per_s,
            decode_step_s=self.load.decode_step_s,
            pool_bytes_per_s=self.load.load_bytes_per_s.get("pool", 0.0),
            free_tokens=free_tokens,
        )


class WorkerDirectory:
    """All known workers, kept up to date by `run`."""

    def __init__(
        self,
        settings: RouterSettings,
        client: WorkerDoor,
        pool: PoolView,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._client = client
        self._pool = pool
        self._on_change = on_change
        self._clock = clock
        self._records: dict[str, WorkerRecord] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._listed: set[str] = set()

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

    async def run(self) -> None:
        """Watch all workers until cancelled."""
        async with asyncio.TaskGroup() as group:
            fixed = {worker_url(worker) for worker in self._settings.workers}
            self._listed = fixed
            while True:
                self._watch_listed(group)
                registered = await self._pool.worker_urls()
                if registered is not None:
                    self._listed = fixed | {url.rstrip("/") for url in registered}
                    self._watch_listed(group)
                await asyncio.sleep(self._settings.refresh_s)

    def _watch_listed(self, group: asyncio.TaskGroup) -> None:
        for url in self._listed - self._watchers.keys():
            if len(self._watchers) >= WORKERS_MAX:
                log.warning("too_many_workers", url=url, workers_max=WORKERS_MAX)
                return
            self._watchers[url] = group.create_task(self._watch(url), name=f"watch-{url}")

    def mark_dead(self, record: WorkerRecord) -> None:
        """Its connection broke; poll it at once to see whether it is back."""
        self._set_alive(record, alive=False)
        record.probe.set()

    async def _watch(self, url: str) -> None:
        record = self._records[url] = WorkerRecord(url, BlockIndex(self._settings.index_blocks_max, self._clock))
        record.heard_s = self._clock()
        try:
            await self._keep_polling(url, record)
        finally:
            _stop_listening(record)
        del self._records[url], self._watchers[url]
        log.info("worker_forgotten", url=url)

    async def _keep_polling(self, url: str, record: WorkerRecord) -> None:
        while record.alive or url in self._listed or self._clock() - record.heard_s < FORGET_S:
            await self._poll(record)
            record.probe.clear()
            try:
                async with asyncio.timeout(self._settings.refresh_s):
                    await record.probe.wait()
                await asyncio.sleep(self._settings.refresh_s / 4)
            except TimeoutError:
                pass

    async def _poll(self, record: WorkerRecord) -> None:
        try:
            facts = await self._client.info(record.url, PROBE_TIMEOUT_S)
            if not record.alive or record.facts is None or record.facts.epoch != facts.epoch:
                await self._client.check_ready(record.url, PROBE_TIMEOUT_S)
            asked_s = self._clock()
            load = await self._client.load(record.url, PROBE_TIMEOUT_S)
        except WorkerUnreachable as error:
            self._missed(record, error)
        else:
            self.heard(record, facts, load, asked_s)
            if facts.events and record.listener is None:
                self._listen(record, facts)

    def heard(self, record: WorkerRecord, facts: WorkerFacts, load: WorkerLoad, asked_s: float) -> None:
        """Take in what a worker says of itself, as of `asked_s`."""
        if record.facts is None or record.facts.epoch != facts.epoch:
            record.index.reset()
            _stop_listening(record)
        elif facts.engine is Engine.STRATAKV and _dropped_cache(record.load, load):
            log.info("worker_dropped_cache", worker=facts.worker)
            record.index.clear()
        if load.l1_blocks_total:
            record.index.resize(min(load.l1_blocks_total, self._settings.index_blocks_max))
        record.facts, record.load, record.load_at_s = facts, load, asked_s
        record.misses, record.heard_s, record.problem = 0, self._clock(), ""
        record.prefilled_tokens = record.ended = 0
        self._set_alive(record, alive=True)

    def _listen(self, record: WorkerRecord, facts: WorkerFacts) -> None:
        feed = KvFeed(record.index, facts.block_size, facts.hash_algorithm)
        subscriber = KvSubscriber(facts.worker, facts.events, facts.replay, feed)
        record.events = feed.status
        record.listener = asyncio.create_task(subscriber.run(), name=f"kv-events-{facts.worker}")

    def _missed(self, record: WorkerRecord, error: WorkerUnreachable) -> None:
        record.misses += 1
        if error.message != record.problem:
            record.problem = error.message
            log.info("worker_does_not_answer", url=record.url, why=error.message)
        refused = not isinstance(error.__cause__, TimeoutError)
        if refused or record.misses >= MISSES_MAX:
            self._set_alive(record, alive=False)
        if record.sent and self._clock() - record.heard_s > SILENT_S_MAX:
            log.warning("worker_silent", url=record.url, in_hand=len(record.sent))
            for sent in record.sent:
                if sent.abort is not None:
                    sent.abort()

    def _set_alive(self, record: WorkerRecord, *, alive: bool) -> None:
        if record.alive == alive:
            return
        record.alive = alive
        log.info(
            "worker_alive" if alive else "worker_gone", url=record.url, worker=record.facts and record.facts.worker
        )
        self._on_change()


def _dropped_cache(before: WorkerLoad, after: WorkerLoad) -> bool:
    """Blocks in use fell to almost none at once: what an administrator's drop looks like from outside."""
    used_before = before.l1_blocks_total - before.l1_blocks_free
    used_after = after.l1_blocks_total - after.l1_blocks_free
    return used_before >= CACHE_DROP_BLOCKS_MIN and used_after * 8 < used_before and not before.running


def _stop_listening(record: WorkerRecord) -> None:
    if record.listener is not None:
        record.listener.cancel()
    record.listener = record.events = None
