"""Receives one worker's KV events over ZeroMQ and keeps its index true: subscribes, asks again for what was missed.

A gap is filled from the publisher's replay socket. Where that is not there, or has forgotten, everything told is forgotten and
what the replay still has is taken as a new beginning. The publisher cannot say that nothing was missed at the end, so it
is asked after a silence. Started by `dbnode.scheduler.workers`, one task per worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import zmq
import zmq.asyncio

from dbnode.kv_events.feed import FeedState, KvFeed, Step
from dbnode.kv_events.wire import EventBatch, MalformedEvents, read_batch
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.member_sockets import as_member

log = EventLogger("dbnode.kv_events")

REPLAY_TIMEOUT_S = 5.0
"""Longest wait for the next replayed batch."""
REPLAY_BATCHES_MAX = 100_000
SILENCE_S = 15.0
"""After so long without events the publisher is asked whether there were any."""
UNANSWERED_MAX = 2
"""So often in vain, and the publisher's word counts no longer until it is heard again."""
RETRY_S = 5.0
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
QUEUED_MAX = 10_000
"""Batches waiting to be read; more are dropped by ZeroMQ, and found to be missing."""


class KvSubscriber:
    """One worker's events; `run` until cancelled."""

    def __init__(
        self,
        name: str,
        events_url: str,
        replay_url: str,
        feed: KvFeed,
        silence_s: float = SILENCE_S,
        credentials: PoolCredentials | None = None,
    ) -> None:
        """With `credentials` the publisher is a member of the pool, and lets only members connect."""
        self.feed = feed
        self._credentials = credentials
        self._name = name
        self._events_url = events_url
        self._replay_url = replay_url
        self._silence_s = silence_s
        self._has_answered = False
        """Whether it has ever been there to be asked for missed events."""
        self._unanswered = 0
        """How often in a row it was not, since."""

    async def run(self) -> None:
        """Never raises but when cancelled; a worker whose events cannot be read is routed to by what it was sent."""
        while self.feed.status.state is not FeedState.REFUSED:
            try:
                await self._follow()
            except (zmq.ZMQError, MalformedEvents) as error:
                log.warning("kv_events_failed", worker=self._name, error=str(error))
                self.feed.lose(str(error))
                await asyncio.sleep(RETRY_S)
            except Exception as error:
                log.exception("kv_events_stopped", worker=self._name)
                self.feed.refuse(f"listening failed: {error}")
        log.warning("kv_events_refused", worker=self._name, why=self.feed.status.detail)

    async def _follow(self) -> None:
        with zmq.asyncio.Context.instance().socket(zmq.SUB) as socket:
            self._prepare(socket, self._events_url)
            socket.subscribe(b"")
            socket.connect(self._events_url)
            await self._begin_anew(None)
            while self.feed.status.state is not FeedState.REFUSED:
                try:
                    async with asyncio.timeout(self._silence_s):
                        batch = read_batch(await socket.recv_multipart())
                except TimeoutError:
                    await self._catch_up(None)
                    self._doubt_the_silent()
                    continue
                if batch is not None:
                    await self._take(batch)

    def _doubt_the_silent(self) -> None:
        """A publisher that has answered before and does so no more may have told what did not arrive."""
        if self._unanswered >= UNANSWERED_MAX and self.feed.status.state is FeedState.LIVE:
            log.warning("kv_events_silent", worker=self._name)
            self.feed.lose("it does not answer any more whether events are missing")

    async def _take(self, batch: EventBatch) -> None:
        match self.feed.take(batch):
            case Step.GAP:
                self.feed.status.gaps += 1
                log.info("kv_events_gap", worker=self._name, expected=self.feed.next_sequence, got=batch.sequence)
                await self._catch_up(batch)
            case Step.RESTARTED:
                self.feed.status.restarts += 1
                log.info("kv_events_restarted", worker=self._name)
                await self._begin_anew(batch)

    async def _catch_up(self, batch: EventBatch | None) -> None:
        """Apply what was missed before this batch, and it; if not all of it can be had, begin anew."""
        expected = self.feed.next_sequence
        async with aclosing(self._replay(expected)) as missed:
            async for found in missed:
                if found.sequence != self.feed.next_sequence:
                    break
                self.feed.apply(found)
        if batch is not None and self.feed.take(batch) is Step.GAP:
            await self._begin_anew(batch)

    async def _begin_anew(self, batch: EventBatch | None) -> None:
        """Forget all, take what the publisher remembers, and then this batch."""
        is_first = True
        self.feed.begin_anew(0)
        async with aclosing(self._replay(0)) as remembered:
            async for found in remembered:
                if not is_first and found.sequence != self.feed.next_sequence:
                    break
                self.feed.apply(found)
                is_first = False
        if batch is not None and (is_first or self.feed.take(batch) is Step.GAP):
            self.feed.begin_anew(batch.sequence)
            self.feed.apply(batch)

    async def _replay(self, start: int) -> AsyncGenerator[EventBatch, None]:
        """What the publisher remembers from this batch on; nothing if it cannot be asked."""
        if not self._replay_url:
            return
        with zmq.asyncio.Context.instance().socket(zmq.DEALER) as socket:
            self._prepare(socket, self._replay_url)
            socket.connect(self._replay_url)
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            for _ in range(REPLAY_BATCHES_MAX):
                try:
                    async with asyncio.timeout(REPLAY_TIMEOUT_S):
                        batch = read_batch(await socket.recv_multipart())
                except TimeoutError:
                    self._unanswered += self._has_answered
                    log.debug("kv_events_no_replay", worker=self._name, url=self._replay_url)
                    return
                self._has_answered, self._unanswered = True, 0
                if batch is None:
                    return
                yield batch

    def _prepare(self, socket: zmq.asyncio.Socket, url: str) -> None:
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RCVHWM, QUEUED_MAX),
            (zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX),
            (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 2000),
            (zmq.IPV6, int("[" in url)),
        ):
            socket.setsockopt(option, value)
        if self._credentials is not None:
            as_member(socket, self._credentials)
