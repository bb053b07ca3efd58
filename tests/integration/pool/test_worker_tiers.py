"""What a worker's tiers do with a real meta server and real daemons: measure them, and find what a preempted request has lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

import pytest
import pytest_asyncio
import torch

from stratakv.keys import KEY_BYTES, BlockKey
from stratakv.pool.dmp_client import ConnectionCache
from stratakv.pool.meta_client import MetaClient
from stratakv.settings import MetaSettings, WorkerSettings
from stratakv.wire import ListNodes, ListOwners, Nodes, OwnerStates, WorkerInfo, WorkerRole
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import NAMESPACE
from tests.integration.pool.published import listed, publish
from tests.support import eventually_async, free_port
from workers.engine.config import EngineDtype
from workers.engine.connector import ExternalHit, LoadJob, Tier
from workers.engine.kv_cache import KVCache
from workers.engine.model_config import ModelFacts
from workers.engine.reservations import Reservations
from workers.metrics import WorkerMetrics
from workers.rates import Rates
from workers.tiers.bandwidth import BandwidthProbe
from workers.tiers.tiers import PoolHit, Tiers

FACTS = ModelFacts(3, 1, 8, 9, 64, frozenset(), EngineDtype.FP32)
BLOCK_SIZE = 2
LAYOUT = FACTS.kv_layout(BLOCK_SIZE)
NUM_BLOCKS = 64
NEAR, FAR = "near", "far"


@dataclass
class WorkerSide:
    """A worker on the host of one of two daemons, without its engine."""

    tiers: Tiers
    cache: KVCache
    client: MetaClient
    near: DaemonProcess

    @property
    def probe(self) -> BandwidthProbe:
        now = Reservations(self.cache, lambda action: action(), lambda: False)
        return self.tiers.bandwidth_probe(now, NUM_BLOCKS)


@pytest_asyncio.fixture
async def worker(
    client: MetaClient, start_daemon: Callable[..., DaemonProcess], meta_port: int
) -> AsyncIterator[WorkerSide]:
    near, _ = (start_daemon(node=node, meta_port=meta_port) for node in (NEAR, FAR))
    await listed(client, NEAR, FAR)
    cache = KVCache(FACTS, NUM_BLOCKS, BLOCK_SIZE, torch.device("cpu"))
    info = WorkerInfo("w", b"e" * 16, "", WorkerRole.BOTH, "m", NAMESPACE, BLOCK_SIZE, 64, node=NEAR)
    tiers = Tiers(
        info,
        LAYOUT,
        WorkerSettings(),
        client,
        ConnectionCache(),
        cache,
        Rates(),
        WorkerMetrics("m"),
        asyncio.get_running_loop(),
        lambda _: None,
    )
    yield WorkerSide(tiers, cache, client, near)
    await tiers.close()


async def test_both_daemons_are_measured_and_nothing_stays_behind(worker: WorkerSide) -> None:
    rates = await worker.probe.measure()
    assert set(rates) == {Tier.L2.value, Tier.POOL.value}
    assert all(rate > 1e6 for rate in rates.values())
    assert worker.cache.use.free == NUM_BLOCKS

    async def are_empty() -> bool:
        nodes = (await worker.client.call(ListNodes(), Nodes)).nodes
        return all(node.used_bytes == 0 for node in nodes)

    await eventually_async(are_empty, what="nothing in use")


async def test_what_cannot_be_measured_is_left_out(worker: WorkerSide) -> None:
    worker.near.kill()
    assert NEAR not in await worker.probe.measure()
    async with MetaClient(replace(MetaSettings(), native_port=free_port())) as nobody:
        assert await replace(worker.probe, meta=nobody).measure() == {}
    assert worker.cache.use.free == NUM_BLOCKS


@pytest.mark.parametrize("load", [PoolHit.load, PoolHit.load_ahead], ids=["in its step", "ahead"])
async def test_what_was_lost_is_found_from_the_engines_thread(
    worker: WorkerSide, load: Callable[[PoolHit, int, list[int]], LoadJob]
) -> None:
    written = await publish(worker.client, worker.near, 6, layout=LAYOUT)
    loop = asyncio.get_running_loop()
    found: asyncio.Future[ExternalHit | None] = loop.create_future()

    def ask() -> None:
        worker.tiers.find(written.keys, 2, lambda hit: loop.call_soon_threadsafe(found.set_result, hit))

    await asyncio.to_thread(ask)
    hit = await asyncio.wait_for(found, 20)
    assert isinstance(hit, PoolHit)
    assert (hit.start_block, list(hit.tiers)) == (2, [Tier.POOL] * 4)
    blocks = worker.cache.allocate(4, None)
    assert blocks is not None
    job = load(hit, 2, blocks)
    for layer in range(FACTS.num_layers):
        await asyncio.to_thread(job.wait_layer, layer)
        is_there = worker.cache.k[layer][blocks[0]].contiguous().view(torch.uint8).flatten().tolist()
        assert bytes(is_there) == written.data[layer][2][0]
    hit.release()


async def test_what_is_written_down_is_its_owners(worker: WorkerSide) -> None:
    keys = [BlockKey(bytes([at]) * KEY_BYTES) for at in range(3)]
    blocks = worker.cache.allocate(3, None)
    assert blocks is not None
    worker.tiers.open()
    job = await asyncio.to_thread(worker.tiers.save, keys, blocks, 7, lambda: None)
    assert job is not None
    for layer in range(FACTS.num_layers):
        job.layer_done(layer)
    assert (await worker.tiers.wait_saved(keys, 20)).is_whole
    (state,) = (await worker.client.call(ListOwners(), OwnerStates)).owners
    assert (state.limit.owner, state.memory_bytes, state.disk_bytes) == (7, 3 * LAYOUT.page_bytes, 0)
