"""A worker's events over real ZeroMQ sockets: what is missed is asked for, what cannot be had is forgotten."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dbnode.kv_events import subscriber as subscriber_module
from dbnode.kv_events.feed import FeedState, KvFeed
from dbnode.kv_events.subscriber import KvSubscriber
from dbnode.scheduler.index import BlockIndex
from stratakv.keys import block_keys
from tests.kv_event_publisher import Publisher, publishing, removed, stored
from tests.support import eventually_async

SIZE = 16
PROMPTS = [list(range(1000 * n, 1000 * n + 64)) for n in range(6)]
KEYS = [block_keys(prompt, SIZE) for prompt in PROMPTS]


class Listener:
    """A subscriber at work."""

    def __init__(self, feed: KvFeed, index: BlockIndex) -> None:
        self.feed = feed
        self.index = index

    async def holds(self, *prompts: int) -> None:
        """Wait until exactly these are believed to be held."""
        await eventually_async(lambda: self._held() == set(prompts), what=f"{prompts} held")

    def _held(self) -> set[int]:
        return {n for n, keys in enumerate(KEYS) if self.index.match(keys) == len(keys)}


@asynccontextmanager
async def listening(publisher: Publisher, *, replay: bool = True, silence_s: float = 60.0) -> AsyncIterator[Listener]:
    index = BlockIndex(1000)
    feed = KvFeed(index, SIZE)
    subscriber = KvSubscriber("w", publisher.events, publisher.replay if replay else "", feed, silence_s)
    task = asyncio.create_task(subscriber.run())
    try:
        await publisher.subscribed()
        yield Listener(feed, index)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_what_was_published_before_is_asked_for() -> None:
    async with publishing() as publisher:
        await publisher.publish(stored(PROMPTS[0], SIZE), lost=True)
        await publisher.publish(stored(PROMPTS[1], SIZE), removed(KEYS[0]), lost=True)
        async with listening(publisher) as listener:
            await listener.holds(1)
            await publisher.publish(stored(PROMPTS[2], SIZE))
            await listener.holds(1, 2)
            assert listener.feed.status.gaps == 0


async def test_a_gap_is_filled_from_the_replay() -> None:
    async with publishing() as publisher, listening(publisher) as listener:
        await publisher.publish(stored(PROMPTS[0], SIZE))
        await listener.holds(0)
        await publisher.publish(removed(KEYS[0]), lost=True)
        await publisher.publish(stored(PROMPTS[1], SIZE), lost=True)
        await publisher.publish(stored(PROMPTS[2], SIZE))
        await listener.holds(1, 2)
        assert listener.feed.status.gaps == 1
        assert publisher.replays == [0, 1]


async def test_after_a_gap_that_nobody_can_fill_only_what_is_remembered_counts() -> None:
    async with publishing() as publisher, listening(publisher) as listener:
        await publisher.publish(stored(PROMPTS[0], SIZE))
        await listener.holds(0)
        await publisher.publish(removed(KEYS[0]), lost=True)
        await publisher.publish(stored(PROMPTS[1], SIZE), lost=True)
        del publisher.sent[:2]  # the replay remembers only the third batch
        await publisher.publish(stored(PROMPTS[2], SIZE))
        await listener.holds(1, 2)
        await publisher.publish(stored(PROMPTS[3], SIZE))
        await listener.holds(1, 2, 3)


async def test_without_a_replay_socket_a_gap_makes_all_forgotten() -> None:
    async with publishing() as publisher, listening(publisher, replay=False) as listener:
        await publisher.publish(stored(PROMPTS[0], SIZE))
        await listener.holds(0)
        await publisher.publish(stored(PROMPTS[1], SIZE), lost=True)
        await publisher.publish(stored(PROMPTS[2], SIZE))
        await listener.holds(2)
        assert publisher.replays == []


async def test_what_is_missed_at_the_end_is_found_after_a_silence() -> None:
    async with publishing() as publisher, listening(publisher, silence_s=0.05) as listener:
        await publisher.publish(stored(PROMPTS[0], SIZE))
        await listener.holds(0)
        await publisher.publish(removed(KEYS[0]), stored(PROMPTS[1], SIZE), lost=True)
        await listener.holds(1)


@pytest.mark.parametrize("num_lost", [0, 2])
async def test_a_publisher_that_begins_anew_is_believed_anew(num_lost: int) -> None:
    async with publishing() as publisher, listening(publisher) as listener:
        for prompt in PROMPTS[:4]:
            await publisher.publish(stored(prompt, SIZE))
        await listener.holds(0, 1, 2, 3)
        publisher.restart()
        for prompt in PROMPTS[3 : 3 + num_lost]:
            await publisher.publish(stored(prompt, SIZE), lost=True)
        await publisher.publish(stored(PROMPTS[5], SIZE))
        await listener.holds(*range(3, 3 + num_lost), 5)
        assert listener.feed.status.restarts == 1


async def test_garbage_ends_belief_until_events_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber_module, "RETRY_S", 0.01)
    async with publishing() as publisher, listening(publisher) as listener:
        await publisher.publish(stored(PROMPTS[0], SIZE))
        await listener.holds(0)
        await publisher.publish(7)
        await eventually_async(lambda: listener.feed.status.state is FeedState.WAITING, what="doubt")
        del publisher.sent[1:]
        await publisher.subscribed()
        await listener.holds(0)


async def test_a_worker_with_other_keys_is_not_listened_to() -> None:
    async with publishing() as publisher:
        await publisher.publish(stored(PROMPTS[0], SIZE) | {"block_hashes": [1, 2, 3, 4]}, lost=True)
        index = BlockIndex(1000)
        feed = KvFeed(index, SIZE)
        async with asyncio.timeout(10):
            await KvSubscriber("w", publisher.events, publisher.replay, feed).run()
        assert feed.status.state is FeedState.REFUSED
        index.add(KEYS[0])
        assert index.match(KEYS[0]) == 4


async def test_a_fault_while_listening_makes_what_was_sent_count_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with publishing() as publisher, listening(publisher) as listener:
        await publisher.publish(stored(PROMPTS[0], SIZE))
        await listener.holds(0)

        def fail(batch: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(listener.feed, "take", fail)
        await publisher.publish(stored(PROMPTS[1], SIZE))
        await eventually_async(lambda: listener.feed.status.state is FeedState.REFUSED, what="the end")
        assert not listener.index.is_told
