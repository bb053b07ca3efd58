"""Round trips of SGLang's host pools through a real pool."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from stratakv.integrations.sglang import StrataKVStorage
from tests.sglang.sglang_server import CONFIG, mha_pool, mla_pool, page_bytes, page_hashes, slots

MakeStorage = Callable[..., StrataKVStorage]
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_come_back_byte_for_byte_into_other_slots(make_storage: MakeStorage, layout: str) -> None:
    host = mha_pool(layout)
    storage = make_storage(host)
    keys = page_hashes(128)
    written = [page_bytes(host, page) for page in range(128)]
    assert storage.batch_exists(keys) == 0
    assert storage.batch_set_v1(keys, slots(*range(128))) == [True] * 128
    assert storage.batch_exists(keys) == 128

    targets = list(range(159, 31, -1))
    assert storage.batch_get_v1(keys, slots(*targets)) == [True] * 128
    assert [page_bytes(host, page) for page in targets] == written


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_pages_of_latents_come_back_byte_for_byte(make_storage: MakeStorage, layout: str) -> None:
    host = mla_pool(layout)
    storage = make_storage(host, config=replace(CONFIG, is_mla_model=True))
    keys, written = page_hashes(3), [page_bytes(host, page) for page in (5, 0, 7)]
    assert storage.batch_set_v1(keys, slots(5, 0, 7)) == [True] * 3
    assert storage.batch_get_v1(keys, slots(20, 21, 22)) == [True] * 3
    assert [page_bytes(host, page) for page in (20, 21, 22)] == written


def test_a_partial_hit_ends_at_the_first_missing_page(make_storage: MakeStorage) -> None:
    host = mha_pool("page_first")
    storage = make_storage(host)
    keys = page_hashes(6)
    storage.batch_set_v1(keys[:2] + keys[3:4], slots(0, 1, 3))
    before = page_bytes(host, 12)
    assert storage.batch_exists(keys) == 2
    assert storage.batch_get_v1(keys[:4], slots(10, 11, 12, 13)) == [True, True, False, False]
    assert page_bytes(host, 12) == before
    assert storage.exists(keys[3])
    assert not storage.exists(keys[5])


def test_pages_that_are_there_already_are_stored_once(make_storage: MakeStorage) -> None:
    host = mha_pool("page_first_direct")
    storage = make_storage(host)
    keys, written = page_hashes(2), page_bytes(host, 0)
    assert storage.batch_set_v1(keys, slots(0, 1)) == [True, True]
    assert storage.batch_set_v1(keys, slots(8, 9)) == [True, True]
    storage.batch_get_v1(keys[:1], slots(20))
    assert page_bytes(host, 20) == written


def test_two_servers_of_one_model_share_pages(make_storage: MakeStorage) -> None:
    ours, theirs = mha_pool("page_first"), mha_pool("page_first")
    keys = page_hashes(4)
    assert make_storage(ours).batch_set_v1(keys, slots(0, 1, 2, 3)) == [True] * 4
    other = make_storage(theirs)
    assert other.batch_exists(keys) == 4
    assert other.batch_get_v1(keys, slots(4, 5, 6, 7)) == [True] * 4
    assert [page_bytes(theirs, p) for p in (4, 5, 6, 7)] == [page_bytes(ours, p) for p in (0, 1, 2, 3)]


def test_each_rank_gets_its_own_share_of_a_page(make_storage: MakeStorage) -> None:
    hosts = [mha_pool("page_first", heads=1) for _ in range(2)]
    ranks = [make_storage(host, config=replace(CONFIG, tp_rank=r, tp_size=2)) for r, host in enumerate(hosts)]
    keys = page_hashes(2)
    written = [[page_bytes(host, page) for page in (0, 1)] for host in hosts]
    ranks[0].batch_set_v1(keys, slots(0, 1))
    assert ranks[1].batch_exists(keys) == 0
    ranks[1].batch_set_v1(keys, slots(0, 1))
    for rank, host, expected in zip(ranks, hosts, written, strict=True):
        assert rank.batch_get_v1(keys, slots(5, 6)) == [True, True]
        assert [page_bytes(host, page) for page in (5, 6)] == expected


def test_latents_that_rank_0_writes_are_every_ranks(make_storage: MakeStorage) -> None:
    hosts = [mla_pool("page_first") for _ in range(2)]
    configs = [replace(CONFIG, is_mla_model=True, tp_rank=rank, tp_size=2) for rank in range(2)]
    writer, reader = (make_storage(host, config=config) for host, config in zip(hosts, configs, strict=True))
    keys = page_hashes(2)
    writer.batch_set_v1(keys, slots(0, 1))
    assert reader.batch_get_v1(keys, slots(3, 4)) == [True, True]
    assert page_bytes(hosts[1], 3) == page_bytes(hosts[0], 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_pages_and_pages_in_place_are_the_same(make_storage: MakeStorage, layout: str) -> None:
    host = mha_pool(layout)
    storage = make_storage(host)
    keys = page_hashes(4)
    storage.batch_set_v1(keys[:2], slots(0, 1))
    assert storage.batch_set(keys[2:], [host.get_data_page(2 * 4), host.get_data_page(3 * 4)])
    pages = storage.batch_get([*keys, page_hashes(1)[0]], [host.get_dummy_flat_data_page() for _ in range(5)])
    assert pages[4] is None
    for page, found in enumerate(pages[:4]):
        assert found is not None
        assert torch.equal(found.view(torch.uint8), host.get_data_page(page * 4).contiguous().view(torch.uint8))
    assert storage.batch_get_v1(keys[2:], slots(20, 21)) == [True, True]
    assert [page_bytes(host, 20), page_bytes(host, 21)] == [page_bytes(host, 2), page_bytes(host, 3)]


def test_single_pages_are_set_and_got(make_storage: MakeStorage) -> None:
    host = mha_pool("page_first")
    storage = make_storage(host)
    key = page_hashes(1)[0]
    assert storage.get(key, host.get_dummy_flat_data_page()) is None
    assert storage.set(key, host.get_data_page(0))
    assert storage.exists(key)
    found = storage.get(key)
    assert found is not None
    assert torch.equal(found.view(torch.uint8), host.get_data_page(0).view(torch.uint8))


def test_clear_drops_the_pages_of_this_namespace_only(make_storage: MakeStorage) -> None:
    host = mha_pool("page_first")
    ours, theirs = make_storage(host, namespace="ours"), make_storage(host, namespace="theirs")
    keys = page_hashes(2)
    for storage in (ours, theirs):
        storage.batch_set_v1(keys, slots(0, 1))
    ours.clear()
    assert ours.batch_exists(keys) == 0
    assert theirs.batch_exists(keys) == 2


def test_stats_tell_of_each_batch_once(make_storage: MakeStorage) -> None:
    storage = make_storage(mha_pool("page_first"))
    keys = page_hashes(3)
    storage.batch_set_v1(keys, slots(0, 1, 2))
    storage.batch_get_v1(keys, slots(4, 5, 6))
    stats = storage.get_stats()
    assert (stats.prefetch_pgs, stats.backup_pgs) == ([3], [3])
    assert all(rate > 0 for rate in stats.prefetch_bandwidth + stats.backup_bandwidth)
    assert storage.get_stats().prefetch_pgs == []
    quiet = make_storage(mha_pool("page_first"), config=replace(CONFIG, enable_storage_metrics=False))
    assert quiet.get_stats() is None


def test_threads_that_store_and_load_the_same_pages_see_whole_ones(make_storage: MakeStorage) -> None:
    source = mha_pool("page_first")
    shared = make_storage(source)
    prefixes = [page_hashes(16) for _ in range(4)]

    def store_and_load(number: int) -> bool:
        host = mha_pool("page_first", pages=64)
        storage = make_storage(host)
        for turn in range(12):
            prefix, first = prefixes[(number + turn) % 4], (number + turn) % 4 * 16
            assert all(shared.batch_set_v1(prefix, slots(*range(first, first + 16))))
            loaded = storage.batch_get_v1(prefix, slots(*range(16)))
            assert all(
                page_bytes(host, page) == page_bytes(source, first + page) for page, ok in enumerate(loaded) if ok
            )
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(store_and_load, range(4)))
    assert all(shared.batch_get_v1(prefix, slots(*range(16))) == [True] * 16 for prefix in prefixes)
