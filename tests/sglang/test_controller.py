"""SGLang's own cache controller writes to the storage, looks up and reads: its loops, without the device side."""

from __future__ import annotations

from collections.abc import Callable
from queue import Queue
from typing import Any

import pytest
from sglang.srt.managers.cache_controller import HiCacheController, PrefetchOperation, StorageOperation

from stratakv.integrations.sglang import StrataKVStorage
from tests.sglang.sglang_server import PAGE, mha_pool, page_bytes, slots
from tests.support import eventually

MakeStorage = Callable[..., StrataKVStorage]
PAGES = 300
"""More than SGLang gives the storage in one call."""


def controller(storage: StrataKVStorage, host: Any, *, in_place: bool) -> HiCacheController:
    """What its `attach_storage_backend` sets, in a process that has no device."""
    made = object.__new__(HiCacheController)
    made.storage_backend, made.storage_host_pool, made.mem_pool_host = storage, host, host
    made.page_size = PAGE
    made.prefetch_sync_queue = Queue()
    made.page_get_func = made._page_get_zero_copy if in_place else made._generic_page_get
    made.page_set_func = made._page_set_zero_copy if in_place else made._generic_page_set
    return made


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "flat"])
def test_a_prompt_that_one_server_backs_up_another_prefetches(make_storage: MakeStorage, in_place: bool) -> None:
    ours, theirs = (mha_pool("page_first", pages=2 * PAGES) for _ in range(2))
    writer = controller(make_storage(ours, namespace=str(in_place)), ours, in_place=in_place)
    reader = controller(make_storage(theirs, namespace=str(in_place)), theirs, in_place=in_place)
    tokens = list(range(PAGES * PAGE))
    hashes, hits = writer._storage_hit_query(PrefetchOperation("query", tokens))
    assert (hashes, hits) == ([], 0)

    lookup = PrefetchOperation("query", tokens)
    writer._storage_hit_query(lookup)
    backup = StorageOperation(slots(*range(PAGES)), tokens, hash_value=lookup.all_hash_values)
    writer._page_backup(backup)
    assert backup.completed_tokens == len(tokens)

    prefetch = PrefetchOperation("prefetch", tokens)
    prefetch.hash_value, found = reader._storage_hit_query(prefetch)
    assert found == len(tokens)
    prefetch.host_indices = slots(*range(PAGES, 2 * PAGES))
    assert reader._page_transfer(prefetch) == PAGES
    assert all(page_bytes(theirs, PAGES + page) == page_bytes(ours, page) for page in range(PAGES))


def test_a_prefetch_ends_at_the_first_page_that_is_gone_since_the_lookup(make_storage: MakeStorage) -> None:
    host = mha_pool("page_first", pages=2 * PAGES)
    storage = make_storage(host, namespace="gone")
    server = controller(storage, host, in_place=True)
    tokens = list(range(200 * PAGE))
    prefetch = PrefetchOperation("prefetch", tokens)
    server._storage_hit_query(prefetch)
    keys = prefetch.all_hash_values
    assert keys is not None
    storage.batch_set_v1(keys[:150], slots(*range(150)))
    prefetch.hash_value, prefetch.host_indices = keys, slots(*range(PAGES, PAGES + 200))
    eventually(lambda: storage.batch_exists(keys) == 150, what="the pages to be found")
    assert server._page_transfer(prefetch) == 150
