"""Pages that are read while they are written: whatever happens in between, only bytes that were written get into L1."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stratakv.keys import KEY_BYTES, BlockKey
from stratakv.pool.dmp_client import ConnectionCache, DmpConnection, TransportKind
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.pages import PageWriter, WritePages
from stratakv.settings import WorkerSettings
from stratakv.wire import PUT_ID_BYTES, WorkerInfo, WorkerRole
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import NAMESPACE, memory_of, random_layers, soon
from tests.support import eventually_async
from workers.engine.config import EngineDtype
from workers.engine.kv_cache import KVCache
from workers.engine.model_config import ModelFacts
from workers.engine.reservations import Reservations
from workers.handover.errors import HandoverFailed
from workers.handover.follow import follow
from workers.handover.incoming import READERS, HandoverTaker, TakenOver
from workers.handover.messages import Answered, AnyMessage, FrameReader
from workers.handover.outgoing import HandoverBook, Outgoing
from workers.metrics import WorkerMetrics
from workers.rates import Rates
from workers.tiers.save import SaveListener
from workers.tiers.tiers import Saved, Tiers

FACTS = ModelFacts(
    num_layers=3,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=9,
    max_model_len=64,
    eos_token_ids=frozenset(),
    dtype=EngineDtype.FP32,
)
BLOCK_SIZE = 2
LAYOUT = FACTS.kv_layout(BLOCK_SIZE)
NUM_BLOCKS = 16
REQUEST = "request"


@dataclass
class Put:
    """A save of the prefill worker, taken step by step."""

    indexes: Sequence[int]
    pages: WritePages
    listener: SaveListener | None

    def tell(self, layers: Sequence[int]) -> None:
        if self.listener is not None:
            self.listener.written(layers, self.pages.checksums(layers))


@dataclass
class Prefill:
    """The prefill worker's side, but for its engine (the `Source` of what is told)."""

    handovers: HandoverBook
    connection: DmpConnection
    keys: list[BlockKey]
    saved: asyncio.Future[bool]
    leases: list[int] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        self.data = random_layers(LAYOUT, len(self.keys), self.seed)
        self.handover = self.handovers.open(REQUEST, self.keys)

    async def wait_saved(self, keys: Sequence[BlockKey], timeout_s: float, lease_s: float = 0.0) -> Saved:
        is_whole = await self.saved
        self.leases.append(7)
        return Saved(is_whole, 7)

    def release_lease(self, lease_id: int) -> None:
        self.leases.remove(lease_id)

    def place(self, indexes: Sequence[int]) -> Put:
        """Room for these blocks of the prompt, told to whoever follows."""
        put_id, keys = os.urandom(PUT_ID_BYTES), [self.keys[index] for index in indexes]
        extents = self.connection.allocate(put_id, len(keys), LAYOUT.page_bytes, 60.0, deadline=soon())
        put = Put(
            indexes,
            PageWriter(LAYOUT, NAMESPACE).begin(self.connection, put_id, extents, keys),
            self.handovers.listener(keys),
        )
        if put.listener is not None:
            put.listener.placed(self.connection.segment, keys, extents)
        return put

    def write(self, put: Put, layers: Sequence[int]) -> None:
        data = [[pages[index] for index in put.indexes] for pages in self.data]
        put.pages.write_layers(layers, memory_of(LAYOUT, data), deadline=soon())

    def spoil(self, put: Put, page: int, layer: int) -> None:
        """Another byte where a layer of a page lies, as if the place had been given to another page."""
        memory = self.connection.transport.mapping()
        assert memory is not None
        memory[put.pages.extents[page].offset + LAYOUT.layer_offsets()[layer]] ^= 0xFF

    def answer(self) -> None:
        self.handover.tell(Answered([7], "length"))


class Wire:
    """What the HTTP client does, without HTTP; `cut_after` messages the other worker is gone."""

    def __init__(self, source: Prefill) -> None:
        self.source = source
        self.cut_after: int | None = None
        self.told: list[AnyMessage] = []

    async def follow(self, url: str, request_id: str) -> AsyncGenerator[AnyMessage, None]:
        reader = FrameReader()
        frames = follow(self.source, await self.source.handovers.follow(request_id))
        try:
            async for frame in frames:
                for message in (*reader.feed(frame[:3]), *reader.feed(frame[3:])):
                    if self.cut_after is not None and len(self.told) >= self.cut_after:
                        raise HandoverFailed("the other worker went away")
                    self.told.append(message)
                    yield message
        finally:
            await frames.aclose()  # type: ignore[attr-defined]

    async def close(self) -> None:
        """There is no connection."""


class World:
    """Both workers over one daemon."""

    def __init__(self, daemon: DaemonProcess, num_keys: int, kind: TransportKind = TransportKind.SHM) -> None:
        loop = asyncio.get_running_loop()
        self.keys = [BlockKey(os.urandom(KEY_BYTES)) for _ in range(num_keys)]
        self._writing = ConnectionCache(force=TransportKind.SHM)
        connection = self._writing.get(daemon.segment, deadline=soon())
        book = HandoverBook(NAMESPACE, loop)
        self.prefill = Prefill(book, connection, self.keys, loop.create_future())
        self.wire = Wire(self.prefill)
        self.cache = KVCache(FACTS, NUM_BLOCKS, BLOCK_SIZE, torch.device("cpu"))
        self.is_crowded = False
        self.reservations = Reservations(self.cache, lambda action: action(), lambda: self.is_crowded)
        info = WorkerInfo("d", b"e" * 16, "", WorkerRole.DECODE, "m", NAMESPACE, BLOCK_SIZE, 64)
        metrics, reading = WorkerMetrics("m"), ConnectionCache(force=kind)
        meta = MetaClient("tcp://127.0.0.1:1")
        self.tiers = Tiers(
            info, LAYOUT, WorkerSettings(), meta, reading, self.cache, Rates(), metrics, loop, lambda _: None
        )
        self.taker = HandoverTaker(
            NAMESPACE,
            self.tiers,
            self.reservations,
            self.cache.num_cached,
            self.wire,
            metrics,  # type: ignore[arg-type]
        )

    def take(self) -> asyncio.Task[TakenOver]:
        return asyncio.create_task(self.taker.take("", REQUEST, self.keys))

    async def read_all(self) -> None:
        """Until what was told has been heard, and no thread reads any more."""
        for _ in range(20):
            await asyncio.sleep(0)
        idle = threading.Barrier(READERS)
        await asyncio.gather(*(asyncio.wrap_future(self.taker.threads.submit(idle.wait)) for _ in range(READERS)))
        for _ in range(20):
            await asyncio.sleep(0)

    async def close(self) -> None:
        await self.taker.close()
        await self.tiers.close()
        self._writing.close()

    def check_l1(self) -> set[int]:
        """Every block of the prompt that can be found in L1 has exactly the bytes that were written; which ones there are."""
        found = {index: self.cache.match([key]) for index, key in enumerate(self.keys)}
        for index, blocks in found.items():
            for block in blocks:
                for layer in range(FACTS.num_layers):
                    parts = (self.cache.k[layer][block], self.cache.v[layer][block])
                    is_there = tuple(bytes(part.contiguous().view(torch.uint8).flatten().tolist()) for part in parts)
                    assert is_there == self.prefill.data[layer][index]
        return {index for index, blocks in found.items() if blocks}

    async def check_rest(self) -> None:
        """Nothing is left reserved, referenced, leased or followed."""
        self.cache.check()
        assert self.cache.use.referenced == 0
        half = self.reservations.reserve(NUM_BLOCKS // 2).result()
        assert len(half) == NUM_BLOCKS // 2
        self.reservations.release(half)
        assert self.prefill.handovers.listener(self.keys) is None
        await eventually_async(lambda: not self.prefill.leases, what="the lease is given back")


def whole_put(world: World, indexes: Sequence[int]) -> Put:
    put = world.prefill.place(indexes)
    for layer in range(FACTS.num_layers):
        world.prefill.write(put, [layer])
        put.tell([layer])
    return put


async def test_what_is_told_is_in_l1_before_the_put_is_finished(daemon: DaemonProcess, kind: TransportKind) -> None:
    world = World(daemon, 6, kind)
    taking = world.take()
    put, late = world.prefill.place(range(4)), world.prefill.place([4, 5])
    for layer in range(FACTS.num_layers):
        world.prefill.write(put, [layer])
        put.tell([layer])
    await eventually_async(lambda: world.check_l1() == {0, 1, 2, 3}, what="the first put is in L1")
    world.prefill.write(late, range(FACTS.num_layers))
    late.tell(range(FACTS.num_layers))
    world.prefill.answer()
    taken = await taking
    assert taken.token_ids == [7]
    assert world.check_l1() == set(range(6))
    assert world.cache.use.referenced == len(taken.held.blocks) == 6
    world.reservations.release(taken.held.blocks)
    await world.check_rest()
    await world.close()


async def test_bytes_that_change_between_announcement_and_read_are_not_used(
    daemon: DaemonProcess, kind: TransportKind
) -> None:
    world = World(daemon, 4, kind)
    taking = world.take()
    good, bad = whole_put(world, [0, 1]), world.prefill.place([2, 3])
    for layer in range(FACTS.num_layers):
        world.prefill.write(bad, [layer])
    world.prefill.spoil(bad, page=1, layer=2)
    bad.tell(range(FACTS.num_layers))
    world.prefill.answer()
    world.prefill.saved.set_result(True)
    taken = await taking
    assert world.check_l1() == {0, 1}
    assert len(taken.held.blocks) == len(good.indexes)
    world.reservations.release(taken.held.blocks)
    await world.check_rest()
    await world.close()


async def test_what_is_not_in_the_pool_in_the_end_makes_the_handover_fail(daemon: DaemonProcess) -> None:
    world = World(daemon, 4)
    taking = world.take()
    whole_put(world, [0, 1])
    world.prefill.answer()
    world.prefill.saved.set_result(False)
    with pytest.raises(HandoverFailed):
        await taking
    await world.check_rest()
    await world.close()


async def test_a_slow_reader_is_waited_for(daemon: DaemonProcess) -> None:
    world, let_go = World(daemon, 4), threading.Event()
    for _ in range(READERS):
        world.taker.threads.submit(let_go.wait)
    taking = world.take()
    whole_put(world, range(4))
    world.prefill.answer()
    world.prefill.saved.set_result(True)
    await eventually_async(lambda: len(world.wire.told) == 6, what="everything is told")
    assert not taking.done()
    assert world.check_l1() == set()
    let_go.set()
    taken = await taking
    assert world.check_l1() == {0, 1, 2, 3}
    world.reservations.release(taken.held.blocks)
    await world.check_rest()
    await world.close()


async def test_blocks_are_not_given_back_while_a_thread_may_write_into_them(daemon: DaemonProcess) -> None:
    world, let_go = World(daemon, 4), threading.Event()
    for _ in range(READERS):
        world.taker.threads.submit(let_go.wait)
    taking = world.take()
    whole_put(world, range(4))
    await eventually_async(lambda: len(world.wire.told) == 4, what="everything is told")
    for _ in range(3):
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
    assert world.cache.use.referenced == 4
    let_go.set()
    await eventually_async(lambda: world.cache.use.referenced == 0, what="the blocks are given back")
    await world.check_rest()
    await world.close()


async def test_without_room_in_l1_the_prompt_is_waited_for(daemon: DaemonProcess) -> None:
    world = World(daemon, 4)
    world.is_crowded = True
    taking = world.take()
    whole_put(world, range(4))
    world.prefill.answer()
    await eventually_async(lambda: len(world.wire.told) == 5, what="everything is told")
    assert not taking.done()
    world.prefill.saved.set_result(True)
    assert await taking == TakenOver([7], (await taking).held)
    assert world.check_l1() == set()
    world.is_crowded = False
    await world.check_rest()
    await world.close()


@dataclass
class Story:
    """What becomes of a prompt on the prefill worker."""

    puts: list[list[int]]
    spoiled: set[tuple[int, int]]
    """(block, layer): other bytes lie there when it is told."""
    spoiled_late: set[tuple[int, int]]
    """The same, but a moment later."""
    is_answered: bool
    is_saved: bool
    cut_after: int | None
    cancel_after: int | None
    is_calm: bool
    """What is told has been read before the next layer is written."""


@st.composite
def stories(draw: st.DrawFn) -> Story:
    num_keys = draw(st.integers(1, 6))
    owner = [draw(st.integers(0, 3)) for _ in range(num_keys)]
    puts = [[index for index in range(num_keys) if owner[index] == number] for number in range(3)]
    places = st.sets(st.tuples(st.integers(0, num_keys - 1), st.integers(0, FACTS.num_layers - 1)), max_size=2)
    step = st.none() | st.integers(0, 14)
    return Story(
        [put for put in puts if put],
        draw(places),
        draw(places),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(step),
        draw(step),
        draw(st.booleans()),
    )


async def play(world: World, story: Story) -> None:
    """The story, up to its end; then nothing is held any more."""
    prefill, taking = world.prefill, world.take()
    world.wire.cut_after = story.cut_after
    puts = [prefill.place(put) for put in story.puts]
    step = 0
    for layer in range(FACTS.num_layers):
        for put in puts:
            prefill.write(put, [layer])
            pages = {index: page for page, index in enumerate(put.indexes)}
            for index in {index for index, at in story.spoiled if at == layer} & pages.keys():
                prefill.spoil(put, pages[index], layer)
            put.tell([layer])
            for index in {index for index, at in story.spoiled_late if at == layer} & pages.keys():
                prefill.spoil(put, pages[index], layer)
            await (world.read_all() if story.is_calm else asyncio.sleep(0))
            step += 1
            if step == story.cancel_after:
                taking.cancel()
    if story.is_answered:
        prefill.answer()
        prefill.saved.set_result(story.is_saved)
    else:
        prefill.handovers.request_over(prefill.handover)
    try:
        taken = await taking
    except (HandoverFailed, asyncio.CancelledError):
        return
    assert story.is_answered
    assert taken.token_ids == [7]
    world.reservations.release(taken.held.blocks)


@settings(max_examples=120, deadline=None)
@given(story=stories())
def test_no_story_gets_another_byte_into_l1_or_leaves_anything_behind(daemon: DaemonProcess, story: Story) -> None:
    async def run() -> None:
        world = World(daemon, max([index for put in story.puts for index in put], default=0) + 1)
        await play(world, story)
        await eventually_async(lambda: world.cache.use.referenced == 0, what="the blocks are given back")
        spoiled = {index for index, _ in story.spoiled - story.spoiled_late}
        assert not world.check_l1() & spoiled
        await world.close()
        assert_followed_by_nobody(world.prefill.handover, world)

    asyncio.run(run())


def assert_followed_by_nobody(handover: Outgoing, world: World) -> None:
    if handover.is_followed:
        assert world.prefill.handovers.listener(world.keys) is None
    world.cache.check()
