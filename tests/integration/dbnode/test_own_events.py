"""What a worker's L1 holds is what the router believes: over real sockets, from any moment on, whatever is missed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from dbnode.kv_events.feed import FeedState, KvFeed
from dbnode.kv_events.subscriber import KvSubscriber
from dbnode.scheduler.index import BlockIndex
from stratakv.errors import SetupError
from stratakv.keys import BlockKey
from stratakv.pool.auth import PoolCredentials
from tests.support import eventually_async
from workers.engine.config import EngineDtype
from workers.engine.kv_cache import KVCache
from workers.engine.model_config import ModelFacts
from workers.kv_events import KvEventPublisher

FACTS = ModelFacts(
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=9,
    max_model_len=64,
    eos_token_ids=frozenset(),
    dtype=EngineDtype.FP32,
)
SIZE = 4
NUM_BLOCKS = 20
KEYS = [BlockKey(hashlib.sha256(bytes([number])).digest()) for number in range(60)]
SECRET = "a secret of the pool that is long"


def new_cache() -> KVCache:
    return KVCache(FACTS, NUM_BLOCKS, SIZE, torch.device("cpu"))


def hold(cache: KVCache, key: BlockKey) -> None:
    """As a prompt of one block does; the least recently used one leaves if need be."""
    blocks = cache.allocate(1, None)
    assert blocks is not None
    cache.register(key, blocks[0])
    cache.release(blocks)


@asynccontextmanager
async def telling(
    cache: KVCache, credentials: PoolCredentials | None = None, changes_max: int = 1000
) -> AsyncIterator[KvEventPublisher]:
    publisher = KvEventPublisher(cache, "127.0.0.1", 0, credentials, batches_kept=5, changes_max=changes_max)
    try:
        async with running(publisher.run()):
            yield publisher
    finally:
        publisher.close()


@asynccontextmanager
async def running(work: asyncio.Future[None] | object) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def listener(
    publisher: KvEventPublisher, credentials: PoolCredentials | None = None, silence_s: float = 60.0
) -> tuple[BlockIndex, KvSubscriber]:
    index = BlockIndex(1000)
    feed = KvFeed(index, SIZE, has_our_keys=True)
    events, replay = (f"tcp://127.0.0.1:{port}" for port in (publisher.events_port, publisher.replay_port))
    return index, KvSubscriber("w", events, replay, feed, silence_s, credentials)


def agree(index: BlockIndex, cache: KVCache) -> bool:
    held = set(cache.keys())
    return index.is_told and all(bool(index.match([key])) is (key in held) for key in KEYS)


async def test_the_router_believes_what_the_cache_holds_while_blocks_come_and_go() -> None:
    cache, rng = new_cache(), random.Random(4)
    async with telling(cache) as publisher:
        index, subscriber = listener(publisher)
        async with running(subscriber.run()):
            for _ in range(10):
                for key in rng.choices(KEYS, k=8):
                    hold(cache, key)
                await eventually_async(lambda: agree(index, cache), what="index and cache agree")
            assert cache.num_evicted
            cache.drop_unreferenced()
            await eventually_async(lambda: agree(index, cache), what="the dropped cache is empty for the router too")
            assert len(index) == 0


async def test_who_comes_late_is_told_everything() -> None:
    cache = new_cache()
    async with telling(cache) as publisher:
        for key in KEYS[:30]:
            hold(cache, key)
            publisher.tell()  # a batch each: more than are kept
        index, subscriber = listener(publisher)
        async with running(subscriber.run()):
            await eventually_async(lambda: agree(index, cache), what="index and cache agree")
        assert subscriber.feed.status.state is FeedState.LIVE


async def test_what_was_missed_is_noticed_in_silence_and_asked_for() -> None:
    cache = new_cache()
    async with telling(cache) as publisher:
        index, subscriber = listener(publisher, silence_s=0.2)
        async with running(subscriber.run()):
            hold(cache, KEYS[0])
            await eventually_async(lambda: agree(index, cache), what="index and cache agree")
            subscriber.feed.begin_anew(1)  # as if all but the first batch had been lost
            assert not agree(index, cache)
            await eventually_async(lambda: agree(index, cache), what="index and cache agree again")


async def test_a_worker_that_answers_no_more_is_not_believed_until_it_is_heard_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dbnode.kv_events.subscriber.REPLAY_TIMEOUT_S", 0.1)
    cache = new_cache()
    publisher = KvEventPublisher(cache, "127.0.0.1", 0)
    index, subscriber = listener(publisher, silence_s=0.1)
    async with running(subscriber.run()):
        async with running(publisher.run()):
            hold(cache, KEYS[0])
            await eventually_async(lambda: agree(index, cache), what="index and cache agree")
        await eventually_async(lambda: not index.is_told, what="the silent worker is not believed")
        async with running(publisher.run()):
            hold(cache, KEYS[1])
            await eventually_async(lambda: agree(index, cache), what="index and cache agree again")
    publisher.close()


async def test_a_journal_that_overflows_costs_nothing_but_a_new_beginning() -> None:
    cache = new_cache()
    async with telling(cache, changes_max=3) as publisher:
        index, subscriber = listener(publisher)
        async with running(subscriber.run()):
            for key in KEYS[:10]:
                hold(cache, key)
            await eventually_async(lambda: agree(index, cache), what="index and cache agree")


async def test_only_members_of_the_pool_are_told() -> None:
    cache, members = new_cache(), PoolCredentials(SECRET)
    async with telling(cache, members) as publisher:
        hold(cache, KEYS[0])
        index, subscriber = listener(publisher, members)
        strange, stranger = listener(publisher, PoolCredentials(SECRET + " or not"))
        async with running(subscriber.run()), running(stranger.run()):
            await eventually_async(lambda: agree(index, cache), what="the member knows")
        assert not strange.is_told


def test_a_taken_port_is_told_by_its_setting() -> None:
    publisher = KvEventPublisher(new_cache(), "127.0.0.1", 0)
    try:
        with pytest.raises(SetupError, match=r"worker\.events_port"):
            KvEventPublisher(new_cache(), "127.0.0.1", publisher.events_port)
    finally:
        publisher.close()
