"""A worker's load of one prefix from several daemons and tiers: every byte in its place, and the bandwidth told for each tier."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from stratakv.keys import BlockKey
from stratakv.pool.dmp_client import ConnectionCache, connect
from stratakv.pool.pages import PageReader
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import LAYOUT, NAMESPACE, WrittenPages, empty_memory, layer_data, soon, write_pages
from tests.support import eventually
from workers.engine.connector import KVLoadError, Tier
from workers.tiers.load import FoundPage, LayerLoad, LoadOutcome
from workers.tiers.window import HostWindow

LAYERS = len(LAYOUT.layers)
TIMEOUT_S = 10.0


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


@pytest.fixture
def two_daemons(start_daemon: Callable[..., DaemonProcess]) -> list[DaemonProcess]:
    return [start_daemon(node="near"), start_daemon(node="far")]


def put(daemon: DaemonProcess, num_pages: int, seed: int) -> WrittenPages:
    connection = connect(daemon.segment, deadline=soon())
    written = write_pages(connection, num_pages, seed=seed)
    connection.close()
    return written


def found(daemon: DaemonProcess, written: WrittenPages, tiers: list[Tier]) -> list[FoundPage]:
    places = written.places(daemon.segment.node)
    pages = zip(written.keys, places, tiers, strict=True)
    return [FoundPage(key, place, daemon.segment, tier) for key, place, tier in pages]


def start(
    pages: list[FoundPage],
    executor: ThreadPoolExecutor,
    connections: ConnectionCache | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[LayerLoad, HostWindow, list[LoadOutcome]]:
    outcomes: list[LoadOutcome] = []
    memory = empty_memory(LAYOUT, len(pages))
    window = HostWindow(memory.layers, memory.rows.tolist())
    load = LayerLoad(pages, window, LAYERS, timeout_s, outcomes.append)
    load.start(executor, PageReader(LAYOUT, NAMESPACE), connections or ConnectionCache())
    return load, window, outcomes


def test_a_prefix_in_three_tiers_of_two_daemons_is_loaded_whole(
    two_daemons: list[DaemonProcess], executor: ThreadPoolExecutor
) -> None:
    near, far = two_daemons
    first, second, third = put(near, 4, seed=1), put(far, 3, seed=2), put(near, 2, seed=3)
    pages = [
        *found(near, first, [Tier.L2, Tier.L2, Tier.L2, Tier.POOL]),
        *found(far, second, [Tier.DISK] * 3),
        *found(near, third, [Tier.POOL] * 2),
    ]
    load, window, outcomes = start(pages, executor)
    for layer in range(LAYERS):
        load.wait_layer(layer)
        assert layer_data(window.memory, layer) == [*first.data[layer], *second.data[layer], *third.data[layer]]
    executor.shutdown()
    assert outcomes[0].num_good_blocks == len(pages)
    assert set(outcomes[0].seconds_by_tier) == {Tier.L2, Tier.POOL, Tier.DISK}
    assert all(seconds > 0 for seconds in outcomes[0].seconds_by_tier.values())


def test_a_load_has_all_of_its_time_from_when_a_thread_takes_it(
    two_daemons: list[DaemonProcess], executor: ThreadPoolExecutor
) -> None:
    near, _ = two_daemons
    written = put(near, 4, seed=1)
    others_are_done = threading.Event()
    executor.submit(others_are_done.wait, TIMEOUT_S)
    load, window, outcomes = start(found(near, written, [Tier.POOL] * 4), executor, timeout_s=1.5)
    eventually(lambda: time.monotonic() > load.deadline)
    others_are_done.set()
    executor.shutdown()
    load.wait_layer(LAYERS - 1)
    assert outcomes[0].num_good_blocks == 4
    assert layer_data(window.memory, 0) == written.data[0]


def test_a_bad_page_of_one_daemon_leaves_what_comes_before_it(
    two_daemons: list[DaemonProcess], executor: ThreadPoolExecutor
) -> None:
    near, far = two_daemons
    first, second = put(near, 2, seed=1), put(far, 3, seed=2)
    pages = [*found(near, first, [Tier.L2] * 2), *found(far, second, [Tier.POOL] * 3)]
    pages[3] = dataclasses.replace(pages[3], key=BlockKey(bytes(32)))
    load, window, outcomes = start(pages, executor)
    with pytest.raises(KVLoadError) as caught:
        load.wait_layer(0)
    executor.shutdown()
    assert caught.value.num_good_blocks == outcomes[0].num_good_blocks == 3
    assert outcomes[0].bad_page == pages[3]
    for layer in range(LAYERS):
        assert layer_data(window.memory, layer)[:3] == [*first.data[layer], *second.data[layer]][:3]


def test_daemons_deliver_at_the_same_time(two_daemons: list[DaemonProcess], executor: ThreadPoolExecutor) -> None:
    near, far = two_daemons
    first, second = put(near, 4, seed=1), put(far, 3, seed=2)
    pages = [*found(near, first, [Tier.L2] * 4), *found(far, second, [Tier.POOL] * 3)]
    connections, both_read = ConnectionCache(), threading.Barrier(2, timeout=10)
    for daemon in two_daemons:
        transport = connections.get(daemon.segment, deadline=soon()).transport
        read_pages = transport.read_pages

        def read_when_both_do(*args: Any, read_pages: Any = read_pages, **options: Any) -> None:
            both_read.wait()
            read_pages(*args, **options)

        transport.read_pages = read_when_both_do  # type: ignore[method-assign]
    load, window, outcomes = start(pages, executor, connections)
    for layer in range(LAYERS):
        load.wait_layer(layer)
        assert layer_data(window.memory, layer) == [*first.data[layer], *second.data[layer]]
    executor.shutdown()
    assert outcomes[0].num_good_blocks == 7
    connections.close()


@pytest.mark.parametrize("bad_pages", [[1], [5], [5, 2], [0, 6]])
def test_damage_in_any_layer_of_any_daemon_leaves_the_blocks_before_it_whole(
    two_daemons: list[DaemonProcess], executor: ThreadPoolExecutor, bad_pages: list[int]
) -> None:
    near, far = two_daemons
    first, second = put(near, 4, seed=1), put(far, 3, seed=2)
    pages = [*found(near, first, [Tier.L2] * 4), *found(far, second, [Tier.POOL] * 3)]
    data = [[*first.data[layer], *second.data[layer]] for layer in range(LAYERS)]
    connections = ConnectionCache()
    for number, bad in enumerate(bad_pages):
        memory = connections.get(pages[bad].segment, deadline=soon()).transport.mapping()
        assert memory is not None
        memory[pages[bad].place.offset + LAYOUT.layer_offsets()[LAYERS - 1 - number]] ^= 1
    load, window, outcomes = start(pages, executor, connections)
    with pytest.raises(KVLoadError) as caught:
        load.wait_layer(LAYERS - 1)
    executor.shutdown()
    num_good = min(bad_pages)
    assert caught.value.num_good_blocks == outcomes[0].num_good_blocks == num_good
    assert outcomes[0].bad_page == pages[num_good]
    for layer in range(LAYERS):
        assert layer_data(window.memory, layer)[:num_good] == data[layer][:num_good]
    connections.close()


def test_of_a_load_from_one_daemon_all_comes_that_lies_before_the_bad_page(
    two_daemons: list[DaemonProcess], executor: ThreadPoolExecutor
) -> None:
    near = two_daemons[0]
    written = put(near, 4, seed=4)
    pages = found(near, written, [Tier.POOL] * 4)
    pages[2] = dataclasses.replace(pages[2], key=BlockKey(bytes(32)))
    load, window, outcomes = start(pages, executor)
    with pytest.raises(KVLoadError) as caught:
        load.wait_layer(0)
    executor.shutdown()
    assert caught.value.num_good_blocks == outcomes[0].num_good_blocks == 2
    assert outcomes[0].bad_page == pages[2]
    for layer in range(LAYERS):
        assert layer_data(window.memory, layer)[:2] == written.data[layer][:2]
