"""The direct linker on SGLang's device pools, which here lie in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import DevicePoolEntry, DevicePoolGroup
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker

from stratakv.integrations.sglang import StrataKVLinker
from tests.sglang.conftest import Pool
from tests.sglang.sglang_server import LAYERS, PAGE, page_hashes, slots
from tests.support import eventually

MakeLinker = Callable[[DevicePoolGroup], StrataKVLinker]
PARAMS = CacheInitParams(False, None, None, PAGE)  # type: ignore[arg-type]


def device_pools(pages: int = 32) -> DevicePoolGroup:
    """K and V of full attention in all layers but the last, which has states of its own."""
    kv = [[torch.randn(pages * PAGE, 2, 8, dtype=torch.bfloat16) for _ in range(LAYERS)] for _ in range(2)]
    states = [[torch.randn(pages, 5)], [torch.randn(pages, 3, dtype=torch.bfloat16)]]
    entries = [
        DevicePoolEntry(
            name=PoolName.KV,
            indices_from_pool=PoolName.KV,
            device_pool=None,
            components=kv,
            layer_mapping={layer: layer for layer in range(LAYERS)},
            page_size=PAGE,
            rows_are_pages=False,
        ),
        DevicePoolEntry(
            name=PoolName.MAMBA,
            indices_from_pool=PoolName.MAMBA,
            device_pool=None,
            components=states,
            layer_mapping={LAYERS: 0},
            page_size=1,
            rows_are_pages=True,
        ),
    ]
    return DevicePoolGroup(entries, LAYERS + 1, PAGE)


@pytest.fixture
def make_linker(pool: Pool) -> Iterator[MakeLinker]:
    with ExitStack() as stack:

        def make(group: DevicePoolGroup) -> StrataKVLinker:
            options = {"meta": pool.meta.endpoint, "model_revision": "1"}
            linker = StrataKVLinker(None, PARAMS, components=set(), extra_config=options, pool_group=group)
            stack.callback(linker.close)
            return linker

        yield make


def transfers(keys: list[str], pages: tuple[int, ...], state: int) -> list[PoolTransfer]:
    return [
        PoolTransfer(name=PoolName.KV, keys=keys, device_indices=slots(*pages)),
        PoolTransfer(
            name=PoolName.MAMBA,
            keys=keys[-1:],
            device_indices=torch.tensor([state]),
            hit_policy=PoolHitPolicy.TRAILING_PAGES,
        ),
    ]


def offload(linker: StrataKVLinker, wanted: list[PoolTransfer]) -> bool:
    assert linker.offload(wanted)
    eventually(lambda: linker.num_completed_offloads() == 1, what="the offload to end")
    return linker.pop_completed_offload()


def rows(group: DevicePoolGroup, pages: tuple[int, ...], state: int) -> list[torch.Tensor]:
    kv, mamba = group.entry_map[PoolName.KV], group.entry_map[PoolName.MAMBA]
    return [b[slots(*pages)] for b in kv.kv_buffer] + [b[state : state + 1] for b in mamba.kv_buffer]


def test_what_one_server_offloads_another_loads_layer_by_layer(make_linker: MakeLinker) -> None:
    ours, theirs = device_pools(), device_pools()
    writer, reader = make_linker(ours), make_linker(theirs)
    keys = page_hashes(3)
    assert offload(writer, transfers(keys, (4, 0, 7), 2))
    assert reader.lookup("r", transfers(keys, (1, 2, 3), 5)) == [3]
    assert reader.load("r", transfers(keys, (1, 2, 3), 5))
    index = reader.start_layer_wise_loading()
    reader.layer_done_counter.set_consumer(index)
    for layer in range(LAYERS + 1):
        reader.layer_done_counter.wait_until(layer)
    assert reader.finish_layer_wise_loading(index)
    for found, written in zip(rows(theirs, (1, 2, 3), 5), rows(ours, (4, 0, 7), 2), strict=True):
        assert torch.equal(found, written)
    assert reader.start_layer_wise_loading() == -1


def test_a_prefix_can_be_restored_where_its_state_lies(make_linker: MakeLinker) -> None:
    linker = make_linker(device_pools())
    keys = page_hashes(6)
    assert offload(linker, transfers(keys[:2], (0, 1), 0))
    assert offload(linker, transfers(keys[:5], (0, 1, 2, 3, 4), 1))
    assert linker.lookup("r", transfers(keys, (0, 1, 2, 3, 4, 5), 0)) == [2, 5]


def test_a_load_of_pages_that_are_gone_is_told_as_failed(make_linker: MakeLinker) -> None:
    linker = make_linker(device_pools())
    assert linker.load("r", transfers(page_hashes(2), (0, 1), 0))
    index = linker.start_layer_wise_loading()
    assert not linker.finish_layer_wise_loading(index)


def test_a_queued_load_can_be_cancelled_and_a_reset_ends_everything(make_linker: MakeLinker) -> None:
    linker = make_linker(device_pools())
    keys = page_hashes(2)
    assert linker.load("r", transfers(keys, (0, 1), 0))
    assert linker.cancel_queued_load("r")
    assert not linker.cancel_queued_load("r")
    assert linker.start_layer_wise_loading() == -1
    linker.offload(transfers(keys, (0, 1), 0))
    linker.reset()
    assert linker.num_completed_offloads() == 0


def test_sglang_finds_the_class_by_its_name() -> None:
    config = {"linker": "StrataKVLinker", "linker_module_path": "stratakv.integrations.sglang"}
    with pytest.raises(AttributeError, match="get_kvcache"):
        # As far as without a device: the class was taken, and asks for its pools.
        create_unified_cache_linker(None, PARAMS, backend="dynamic", config=config, components=set())  # type: ignore[arg-type]
