"""The workers this DB node knows: who they are, whether they live, how busy they are, what they hold.

URLs come from the settings and from the meta server; each is asked for its facts and its load every `refresh_s`. A refused
connection is believed at once, silence after two polls; a worker that has been silent for long loses the requests it has in
hand, so that they can go on elsewhere. A worker that publishes KV events is listened to as long as it is known.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from dbnode.errors import WorkerUnreachable
from dbnode.kv_events.feed import KvFeed
from dbnode.kv_events.subscriber import KvSubscriber
from dbnode.scheduler.fleet import Fleet, WorkerRecord
from dbnode.scheduler.pool_view import PoolView
from dbnode.worker_base import WorkerDoor
from dbnode.worker_messages import Engine, WorkerFacts
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials
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


class WorkerDirectory(Fleet):
    """All known workers, kept up to date by `run`."""

    def __init__(
        self,
        settings: RouterSettings,
        client: WorkerDoor,
        pool: PoolView,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        credentials: PoolCredentials | None = None,
    ) -> None:
        super().__init__(settings, clock)
        self._client = client
        self._pool = pool
        self._on_change = on_change
        self._credentials = credentials
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._listed: set[str] = set()

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
        self._lost(record)
        record.probe.set()

    async def _watch(self, url: str) -> None:
        record = self.add(url)
        try:
            await self._keep_polling(url, record)
        finally:
            _stop_listening(record)
        del self._records[url], self._watchers[url]
        self._changed()
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
        if record.facts is None or record.facts.epoch != facts.epoch:
            _stop_listening(record)
        was_alive = record.alive
        super().heard(record, facts, load, asked_s)
        if not was_alive:
            self._alive_changed(record)

    def _listen(self, record: WorkerRecord, facts: WorkerFacts) -> None:
        is_ours = facts.engine is Engine.STRATAKV
        feed = KvFeed(record.index, facts.block_size, facts.hash_algorithm, has_our_keys=is_ours)
        credentials = self._credentials if is_ours else None
        subscriber = KvSubscriber(facts.worker, facts.events, facts.replay, feed, credentials=credentials)
        record.events = feed.status
        record.listener = asyncio.create_task(subscriber.run(), name=f"kv-events-{facts.worker}")

    def _missed(self, record: WorkerRecord, error: WorkerUnreachable) -> None:
        record.misses += 1
        if error.message != record.problem:
            record.problem = error.message
            log.info("worker_does_not_answer", url=record.url, why=error.message)
        refused = not isinstance(error.__cause__, TimeoutError)
        if refused or record.misses >= MISSES_MAX:
            self._lost(record)
        if record.sent and self._clock() - record.heard_s > SILENT_S_MAX:
            log.warning("worker_silent", url=record.url, in_hand=len(record.sent))
            for sent in list(record.sent):
                if sent.abort is not None:
                    sent.abort()

    def _lost(self, record: WorkerRecord) -> None:
        if record.alive:
            record.alive = False
            self._changed()
            self._alive_changed(record)

    def _alive_changed(self, record: WorkerRecord) -> None:
        name = record.facts and record.facts.worker
        log.info("worker_alive" if record.alive else "worker_gone", url=record.url, worker=name)
        self._on_change()


def _stop_listening(record: WorkerRecord) -> None:
    if record.listener is not None:
        record.listener.cancel()
    record.listener = record.events = None
