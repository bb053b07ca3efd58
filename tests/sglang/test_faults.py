"""What is damaged, gone or wrong is a miss: SGLang never sees an exception, nor bytes that are not what it stored."""

from __future__ import annotations

import random
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from prometheus_client import REGISTRY

from stratakv.integrations.sglang import StrataKVStorage
from stratakv.pool.dmp_client import TransportKind, connect
from tests.integration.pool.pages import soon
from tests.sglang.conftest import Pool
from tests.sglang.sglang_server import mha_pool, page_bytes, page_hashes, slots
from tests.support import eventually

MakeStorage = Callable[..., StrataKVStorage]


def _failures(call: str, reason: str) -> float:
    labels = {"call": call, "reason": reason}
    return REGISTRY.get_sample_value("stratakv_sglang_failures_total", labels) or 0.0


def test_a_flipped_bit_makes_its_page_a_miss_and_no_other(make_storage: MakeStorage, pool: Pool) -> None:
    host = mha_pool("page_first")
    storage = make_storage(host)
    keys, written = page_hashes(8), [page_bytes(host, page) for page in range(8)]
    storage.batch_set_v1(keys, slots(*range(8)))
    victim = written[3][5:60]
    connection = connect(pool.daemons["dmp-t"].segment, deadline=soon(), force=TransportKind.SHM)
    memory = connection.transport.mapping()
    assert memory is not None
    at = bytes(memory).index(victim)
    memory[at + random.randrange(len(victim))] ^= 1 << random.randrange(8)
    del memory
    connection.close()

    loaded = storage.batch_get_v1(keys, slots(*range(20, 28)))
    assert loaded == [True, True, True, False, True, True, True, True]
    assert all(page_bytes(host, 20 + page) == written[page] for page in range(8) if loaded[page])
    eventually(lambda: storage.batch_exists(keys) == 3, what="the damaged page to leave the index")
    assert storage.batch_set_v1(keys, slots(*range(8))) == [True] * 8
    assert storage.batch_get_v1(keys, slots(*range(20, 28))) == [True] * 8


def test_a_daemon_that_is_killed_costs_its_pages_and_new_ones_go_elsewhere(
    make_storage: MakeStorage, make_pool: Callable[[], Pool]
) -> None:
    pool = make_pool()
    host = mha_pool("page_first")
    storage = make_storage(host, on=pool)
    keys = page_hashes(4)
    assert storage.batch_set_v1(keys, slots(0, 1, 2, 3)) == [True] * 4
    pool.daemons["dmp-t"].kill()
    assert storage.batch_get_v1(keys, slots(4, 5, 6, 7)) == [False] * 4
    pool.start_daemon("dmp-u")
    eventually(lambda: storage.batch_exists(keys) == 0, what="the dead daemon's pages to be gone")
    eventually(lambda: all(storage.batch_set_v1(keys, slots(0, 1, 2, 3))), what="pages to be stored elsewhere")
    assert storage.batch_get_v1(keys, slots(4, 5, 6, 7)) == [True] * 4
    assert page_bytes(host, 4) == page_bytes(host, 0)


def test_without_a_meta_server_everything_is_a_miss_and_works_again_with_it(
    make_storage: MakeStorage, make_pool: Callable[[], Pool]
) -> None:
    pool = make_pool()
    host = mha_pool("page_first")
    storage = make_storage(host, on=pool)
    keys = page_hashes(2)
    storage.batch_set_v1(keys, slots(0, 1))
    pool.meta.kill()
    failures = _failures("set", "unavailable")
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v1(keys, slots(4, 5)) == [False, False]
    assert storage.batch_set_v1(page_hashes(1), slots(0)) == [False]
    assert storage.batch_get(keys, [host.get_dummy_flat_data_page() for _ in keys]) == [None, None]
    assert not storage.batch_set(page_hashes(1), [host.get_data_page(0)])
    storage.clear()
    assert _failures("set", "unavailable") == failures + 2
    pool.meta.start()
    eventually(lambda: storage.batch_exists(keys) == 2, timeout_s=30, what="the meta server to be back")
    assert storage.batch_get_v1(keys, slots(4, 5)) == [True, True]


def test_a_storage_that_starts_before_the_meta_server_works_once_that_is_there(
    make_storage: MakeStorage, make_pool: Callable[[], Pool]
) -> None:
    pool = make_pool()
    pool.meta.kill()
    storage = make_storage(mha_pool("page_first"), on=pool)
    keys = page_hashes(1)
    assert storage.batch_set_v1(keys, slots(0)) == [False]
    pool.meta.start()
    eventually(lambda: storage.batch_set_v1(keys, slots(0)) == [True], timeout_s=30, what="the page to be stored")


def test_pages_beyond_the_pools_room_are_told_as_not_stored(
    make_storage: MakeStorage, make_pool: Callable[[], Pool]
) -> None:
    host = mha_pool("page_first", pages=64, heads=256)
    storage = make_storage(host, on=make_pool(), save_timeout_s=5.0)
    prefixes = [page_hashes(64) for _ in range(4)]
    results = [storage.batch_set_v1(keys, slots(*range(64))) for keys in prefixes]
    assert not all(all(stored) for stored in results)
    for keys, stored in zip(prefixes, results, strict=True):
        loaded = storage.batch_get_v1(keys, slots(*range(64)))
        assert not any(there and not told for there, told in zip(loaded, stored, strict=True))


@pytest.mark.parametrize(
    "indices",
    [torch.arange(3), torch.arange(1, 5), torch.tensor([0, 1, 3, 2]), torch.arange(4) + 4 * 10_000],
    ids=["part of a page", "unaligned", "disordered", "outside"],
)
def test_slots_that_are_no_page_are_refused(make_storage: MakeStorage, indices: torch.Tensor) -> None:
    storage = make_storage(mha_pool("page_first"))
    assert storage.batch_set_v1(page_hashes(1), indices) == [False]
    assert storage.batch_get_v1(page_hashes(1), indices) == [False]


def test_a_fault_of_our_own_is_a_miss_too(make_storage: MakeStorage) -> None:
    storage = make_storage(mha_pool("page_first"))
    bugs = _failures("get", "bug")
    with patch("stratakv.integrations.page_store.PageStore.load", side_effect=KeyError("a bug")):
        assert storage.batch_get_v1(page_hashes(2), slots(0, 1)) == [False, False]
    assert _failures("get", "bug") == bugs + 1


def test_a_closed_storage_misses(make_storage: MakeStorage) -> None:
    storage = make_storage(mha_pool("page_first"))
    keys = page_hashes(1)
    storage.batch_set_v1(keys, slots(0))
    storage.close()
    storage.close()
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v1(keys, slots(1)) == [False]
