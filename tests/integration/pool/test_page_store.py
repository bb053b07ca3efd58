"""Whole pages put and loaded by threads, and which engines share them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stratakv.errors import Unavailable
from stratakv.integrations.link import PoolLink, read_credentials
from stratakv.integrations.page_store import PageStore
from stratakv.integrations.sglang.options import Options
from stratakv.integrations.sglang.scope import Ranks, ServerScope
from stratakv.integrations.vllm import options as vllm_options
from stratakv.keys import KEY_BYTES, BlockKey, Namespace, NamespaceScope
from stratakv.layout import KVLayout
from stratakv.pool.dmp_client import ConnectionCache, TransportKind
from stratakv.pool.errors import PutRefused
from stratakv.pool.pages import PageMemory
from stratakv.wire import PUT_ID_BYTES, ListNodes, Nodes
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import LAYOUT, NAMESPACE, empty_memory, memory_of, random_layers
from tests.meta_process import MetaProcess
from tests.service_process import ServiceProcess
from tests.support import eventually

CALL_S_MAX = 5.0
NUMERICS = "dtype=fp16"
SECRET = "a secret of the pool under test"


@pytest.fixture
def link(meta_server: ServiceProcess, meta_port: int, start_daemon: Callable[..., DaemonProcess]) -> Iterator[PoolLink]:
    start_daemon(meta_port=meta_port)
    link = PoolLink(f"tcp://127.0.0.1:{meta_port}", credentials=None, role="test", name="test")
    eventually(lambda: link.is_available and link.local_node() == "dmp-t", what="the pool to be ready")
    yield link
    link.close()


def store_of(link: PoolLink, namespace: Namespace = NAMESPACE, layout: KVLayout = LAYOUT) -> PageStore:
    return PageStore(link, layout, namespace, name="test", node=lambda: "dmp-t")


def some_keys(count: int) -> list[BlockKey]:
    return [BlockKey(os.urandom(KEY_BYTES)) for _ in range(count)]


def filled(num_pages: int, seed: int = 0) -> PageMemory:
    return memory_of(LAYOUT, random_layers(LAYOUT, num_pages, seed))


def contents(memory: PageMemory, page: int) -> list[bytes]:
    row = int(memory.rows[page])
    sizes = [r.size_bytes for layer in LAYOUT.layers for r in layer.ranges]
    parts = [part for layer in memory.layers for part in layer]
    return [
        bytes(memoryview(part.memory)[part.start + row * part.stride :][:size])
        for part, size in zip(parts, sizes, strict=True)
    ]


@pytest.mark.usefixtures("moves")
def test_pages_come_back_as_they_were_put(link: PoolLink) -> None:
    store, keys, written, read = store_of(link), some_keys(9), filled(9), empty_memory(LAYOUT, 9)
    assert store.present(keys) == [False] * 9
    assert store.put(keys[:4] + keys[6:], PageMemory(written.layers, written.rows[[0, 1, 2, 3, 6, 7, 8]])) == [True] * 7
    assert store.count(keys) == 4
    assert store.present(keys) == [True] * 4 + [False] * 2 + [True] * 3
    assert store.load(keys, read) == [True] * 4 + [False] * 5
    assert all(contents(read, page) == contents(written, page) for page in range(4))


def test_a_member_of_a_pool_with_a_secret_moves_pages_over_tcp(
    migrated_url: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    credentials = read_credentials(str(tmp_path / "secret"))
    meta = MetaProcess(migrated_url, tmp_path, secret=SECRET)
    meta.start()
    start_daemon(meta_port=meta.port, flags=("--secret", SECRET))
    ours, stranger = (PoolLink(meta.endpoint, credentials=c, role="test", name="t") for c in (credentials, None))
    ours.connections = ConnectionCache(credentials=credentials, force=TransportKind.TCP)
    eventually(lambda: ours.is_available and ours.local_node() == "dmp-t", what="the pool to be ready")
    keys, written, read = some_keys(3), filled(3), empty_memory(LAYOUT, 3)
    assert store_of(ours).put(keys, written) == [True] * 3
    assert store_of(ours).load(keys, read) == [True] * 3
    assert contents(read, 2) == contents(written, 2)
    with pytest.raises(Unavailable):
        store_of(stranger).count(keys)
    for link in (ours, stranger):
        link.close()
    meta.kill()


def test_a_daemon_that_knows_of_a_later_leader_takes_no_pages_of_an_earlier_grant(link: PoolLink) -> None:
    daemon = next(node.segment for node in link.call(ListNodes(), Nodes).result(CALL_S_MAX).nodes)
    connection = link.connections.get(daemon, deadline=time.monotonic() + CALL_S_MAX)
    later = 1 << 62
    connection.allocate(
        os.urandom(PUT_ID_BYTES), 1, 4096, CALL_S_MAX, deadline=time.monotonic() + CALL_S_MAX, term=later
    )
    with pytest.raises(PutRefused):
        store_of(link).put(some_keys(2), filled(2))


def test_a_closed_link_fails_calls_at_once(link: PoolLink) -> None:
    store = store_of(link)
    link.close()
    with pytest.raises(Unavailable):
        store.count(some_keys(1))


class Engines:
    """Namespaces of the same model, page size and layout, as each engine makes them."""

    worker = NamespaceScope("weights", "tokenizer", LAYOUT.dtype, LAYOUT.digest(), LAYOUT.page_tokens).namespace()
    sglang = ServerScope("weights", NUMERICS, Options()).namespace("kv", LAYOUT, Ranks())
    sglang_as_worker = ServerScope("weights", NUMERICS, Options(namespace_id=worker.hex())).namespace(
        "kv", LAYOUT, Ranks()
    )
    vllm_as_worker = vllm_options.Options(namespace_id=worker.hex()).declared_namespace() or NAMESPACE


def test_engines_are_kept_apart_even_where_keys_and_layout_are_equal(link: PoolLink) -> None:
    keys = some_keys(2)
    worker, sglang = store_of(link, Engines.worker), store_of(link, Engines.sglang)
    written = {store: filled(2, seed) for seed, store in enumerate((worker, sglang))}
    worker.put(keys, written[worker])
    assert sglang.count(keys) == 0
    sglang.put(keys, written[sglang])
    for store in (worker, sglang):
        read = empty_memory(LAYOUT, 2)
        assert store.load(keys, read) == [True, True]
        assert contents(read, 1) == contents(written[store], 1)


@pytest.mark.parametrize("declared", [Engines.sglang_as_worker, Engines.vllm_as_worker], ids=["sglang", "vllm"])
def test_engines_that_were_declared_equal_share_pages(link: PoolLink, declared: Namespace) -> None:
    keys, written, read = some_keys(2), filled(2), empty_memory(LAYOUT, 2)
    store_of(link, Engines.worker).put(keys, written)
    assert store_of(link, declared).load(keys, read) == [True, True]
    assert contents(read, 0) == contents(written, 0)


def test_a_layout_that_was_wrongly_declared_equal_is_a_miss(link: PoolLink) -> None:
    keys = some_keys(1)
    store_of(link, Engines.worker).put(keys, filled(1))
    wider = replace(LAYOUT, layers=LAYOUT.layers * 2)
    read = empty_memory(wider, 1)
    assert store_of(link, Engines.sglang_as_worker, wider).load(keys, read) == [False]
    assert not any(np.frombuffer(part.memory, np.uint8).any() for layer in read.layers for part in layer)
