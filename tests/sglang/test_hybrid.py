"""Several host pools at once: the v2 calls of hybrid models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

from stratakv.integrations.sglang import StrataKVStorage
from tests.sglang.sglang_server import CONFIG, PAGE, mamba_pool, mha_pool, mla_pool, page_bytes, page_hashes, slots

MakeStorage = Callable[..., StrataKVStorage]


def _with_states(make_storage: MakeStorage, states: Any, **options: Any) -> StrataKVStorage:
    storage = make_storage(mha_pool("page_first"), **options)
    storage.register_mem_host_pool_v2(states, PoolName.MAMBA)
    return storage


def _states(keys: list[str], *slot: int) -> PoolTransfer:
    return PoolTransfer(
        name=PoolName.MAMBA,
        host_indices=torch.tensor(slot),
        keys=keys,
        hit_policy=PoolHitPolicy.TRAILING_PAGES,
    )


@pytest.mark.parametrize("extra_state", [False, True], ids=["in place", "copied"])
def test_states_come_back_byte_for_byte(make_storage: MakeStorage, extra_state: bool) -> None:
    states = mamba_pool(extra_state=extra_state)
    storage = _with_states(make_storage, states)
    keys, written = page_hashes(2), [page_bytes(states, slot, 1) for slot in (3, 9)]
    assert storage.batch_set_v2([_states(keys, 3, 9)]) == {PoolName.MAMBA: [True, True]}
    assert storage.batch_get_v2([_states(keys, 20, 21)]) == {PoolName.MAMBA: [True, True]}
    assert [page_bytes(states, slot, 1) for slot in (20, 21)] == written


def test_a_prefix_can_be_restored_where_its_state_was_kept(make_storage: MakeStorage) -> None:
    storage = _with_states(make_storage, mamba_pool())
    keys = page_hashes(8)
    storage.batch_set_v1(keys[:7], slots(*range(7)))
    storage.batch_set_v2([_states([keys[2]], 0)])
    storage.batch_set_v2([_states([keys[4]], 1)])
    found = storage.batch_exists_v2(keys, [_states([keys[-1]])])
    assert found.kv_hit_pages == 5
    assert found.restorable_prefix_pages == [3, 5]
    assert found.extra_pool_hit_pages == {PoolName.KV: 7, PoolName.MAMBA: 5}


def test_a_pool_that_needs_all_pages_ends_the_prefix(make_storage: MakeStorage) -> None:
    storage = make_storage(mla_pool("page_first"), config=replace(CONFIG, is_mla_model=True))
    indexer = mla_pool("page_first")
    storage.register_mem_host_pool_v2(indexer, PoolName.INDEXER)
    keys = page_hashes(5)
    storage.batch_set_v1(keys, slots(*range(5)))
    transfer = PoolTransfer(name=PoolName.INDEXER, host_indices=slots(0, 1, 2), keys=keys[:3])
    assert storage.batch_exists_v2(keys, [transfer]).kv_hit_pages == 0
    storage.batch_set_v2([transfer])
    found = storage.batch_exists_v2(keys, [transfer])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (3, [1, 2, 3])
    back = PoolTransfer(name=PoolName.INDEXER, host_indices=slots(9, 8, 7, 6), keys=keys[:4])
    assert storage.batch_get_v2([back]) == {PoolName.INDEXER: [True, True, True, False]}
    assert page_bytes(indexer, 9) == page_bytes(indexer, 0)


def test_pools_do_not_take_each_others_pages_for_their_own(make_storage: MakeStorage) -> None:
    storage = make_storage(mla_pool("page_first"), config=replace(CONFIG, is_mla_model=True))
    storage.register_mem_host_pool_v2(mla_pool("page_first"), PoolName.INDEXER)
    keys = page_hashes(1)
    storage.batch_set_v1(keys, slots(0))
    transfer = PoolTransfer(name=PoolName.INDEXER, host_indices=slots(1), keys=keys)
    assert storage.batch_get_v2([transfer]) == {PoolName.INDEXER: [False]}


def test_states_are_each_ranks_own_where_the_kv_is_replicated(make_storage: MakeStorage) -> None:
    keys = page_hashes(1)
    config = replace(CONFIG, is_mla_model=True, tp_size=2)
    ranks = []
    for rank in range(2):
        storage = make_storage(mla_pool("page_first"), config=replace(config, tp_rank=rank))
        storage.register_mem_host_pool_v2(mamba_pool(), PoolName.MAMBA)
        ranks.append(storage)
    ranks[0].batch_set_v1(keys, slots(0))
    ranks[0].batch_set_v2([_states(keys, 0)])
    assert ranks[1].batch_exists(keys) == 1
    assert ranks[1].batch_get_v2([_states(keys, 1)]) == {PoolName.MAMBA: [False]}


def test_an_anchor_without_memory_has_every_page_and_leaves_the_say_to_the_others(make_storage: MakeStorage) -> None:
    storage = make_storage(LogicalHostPool(40 * PAGE, PAGE))
    storage.register_mem_host_pool_v2(mla_pool("page_first"), PoolName.DEEPSEEK_V4_C4)
    keys = page_hashes(3)
    assert storage.batch_set_v1(keys, slots(0, 1, 2)) == [True] * 3
    transfer = PoolTransfer(name=PoolName.DEEPSEEK_V4_C4, host_indices=slots(0, 1), keys=keys[:2])
    storage.batch_set_v2([transfer])
    assert storage.batch_exists_v2(keys, [transfer]).kv_hit_pages == 2


def test_a_pool_that_was_not_registered_is_a_miss(make_storage: MakeStorage) -> None:
    storage = make_storage(mha_pool("page_first"))
    keys = page_hashes(1)
    storage.batch_set_v1(keys, slots(0))
    assert storage.batch_get_v2([_states(keys, 0)]) == {PoolName.MAMBA: [False]}
    assert storage.batch_exists_v2(keys, [_states(keys)]).kv_hit_pages == 0


def test_a_policy_that_is_unknown_has_no_say(make_storage: MakeStorage) -> None:
    storage = _with_states(make_storage, mamba_pool())
    keys = page_hashes(2)
    storage.batch_set_v1(keys, slots(0, 1))
    groups = replace(_states(keys), hit_policy=PoolHitPolicy.BLOCK_GROUPS)
    found = storage.batch_exists_v2(keys, [groups])
    assert found.kv_hit_pages == 2
    assert PoolName.MAMBA not in found.extra_pool_hit_pages
