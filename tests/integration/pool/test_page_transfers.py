"""Batches of pages end as they should over every transport, by either implementation: refused, cancelled, late, given up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from stratakv._native import Gate, make_gate
from stratakv.keys import KEY_BYTES, BlockKey
from stratakv.pool import tcp
from stratakv.pool.dmp_client import DmpConnection, TransportKind, connect
from stratakv.pool.errors import (
    DamagedPage,
    OutOfBounds,
    PutRefused,
    StalePage,
    TransferCancelled,
    TransportError,
    TransportTimeout,
)
from stratakv.pool.pages import PageMemory, PageReader, PageWriter, WritePages
from stratakv.pool.transport import Cancellation
from stratakv.wire import PUT_ID_BYTES, Extent, Place
from tests.integration.pool.daemon import MIB, DaemonProcess
from tests.integration.pool.pages import (
    LAYOUT,
    NAMESPACE,
    WrittenPages,
    empty_memory,
    layer_data,
    memory_of,
    random_layers,
    read_headers,
    soon,
    write_pages,
)

pytestmark = pytest.mark.usefixtures("moves")
ALL_LAYERS = range(len(LAYOUT.layers))


@pytest.fixture(autouse=True)
def _several_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are spread over sockets here, however small they are."""
    monkeypatch.setattr(tcp, "LANE_BYTES", 1)


def begin(connection: DmpConnection, put_id: bytes, extents: list[Extent]) -> WritePages:
    keys = [BlockKey(os.urandom(KEY_BYTES)) for _ in extents]
    return PageWriter(LAYOUT, NAMESPACE).begin(connection, put_id, extents, keys)


def granted(connection: DmpConnection, num_pages: int = 1) -> WritePages:
    put_id = os.urandom(PUT_ID_BYTES)
    return begin(connection, put_id, connection.allocate(put_id, num_pages, LAYOUT.page_bytes, 60.0, deadline=soon()))


def source(num_pages: int = 1) -> PageMemory:
    return memory_of(LAYOUT, random_layers(LAYOUT, num_pages, 1))


def test_pages_of_no_live_put_are_refused_and_the_connection_lives(connection: DmpConnection) -> None:
    extents = granted(connection).extents
    stranger = begin(connection, os.urandom(PUT_ID_BYTES), list(extents))
    with pytest.raises(PutRefused):
        stranger.write_layers(ALL_LAYERS, source(), deadline=soon())
    assert read_headers(connection, write_pages(connection, 1)).failures == {}


def test_pages_beyond_the_segment_are_refused_and_the_connection_lives(connection: DmpConnection) -> None:
    pages = read_headers(connection, write_pages(connection, 1))
    pages._offsets[0] = 16 * MIB
    memory = empty_memory(LAYOUT, 1)
    with pytest.raises(OutOfBounds):
        pages.read_layers(ALL_LAYERS, memory, deadline=soon())
    assert layer_data(memory, 0) == layer_data(empty_memory(LAYOUT, 1), 0)
    assert read_headers(connection, write_pages(connection, 1)).failures == {}


@pytest.mark.parametrize(("frame_bytes", "frame_ranges"), [(120, 8192), (300, 8192), (2**26, 1), (2**26, 3)])
def test_batches_may_be_cut_into_frames_anywhere(
    connection: DmpConnection, monkeypatch: pytest.MonkeyPatch, frame_bytes: int, frame_ranges: int
) -> None:
    monkeypatch.setattr(tcp, "FRAME_BYTES", frame_bytes)
    monkeypatch.setattr(tcp, "FRAME_RANGES", frame_ranges)
    written = write_pages(connection, 7)
    memory = empty_memory(LAYOUT, 7)
    read_headers(connection, written).read_layers(ALL_LAYERS, memory, deadline=soon())
    assert [layer_data(memory, layer) for layer in ALL_LAYERS] == written.data
    pages, again, done = granted(connection, 7), empty_memory(LAYOUT, 7), make_gate()
    pages.write(memory, deadline=soon())
    read_whole(connection, pages, again, done)
    assert [layer_data(again, layer) for layer in ALL_LAYERS] == written.data
    assert done.open_layers == len(ALL_LAYERS)


def read_whole(connection: DmpConnection, pages: WritePages, memory: PageMemory, done: Gate | None = None) -> None:
    places = [Place("dmp-t", e.offset, e.generation) for e in pages.extents]
    PageReader(LAYOUT, NAMESPACE).read(connection, places, pages.keys, memory, done=done, deadline=soon())


def test_pages_written_at_once_are_those_written_step_by_step(connection: DmpConnection) -> None:
    pages, data = granted(connection, 5), random_layers(LAYOUT, 5, 3)
    pages.write(memory_of(LAYOUT, data), deadline=soon())
    written = WrittenPages(LAYOUT, pages.put_id, list(pages.keys), list(pages.extents), data)
    memory = empty_memory(LAYOUT, 5)
    found = read_headers(connection, written)
    assert found.failures == {}
    found.read_layers(ALL_LAYERS, memory, deadline=soon())
    assert [layer_data(memory, layer) for layer in ALL_LAYERS] == data


def test_a_page_that_is_another_is_named_before_any_layer_is_let_through(connection: DmpConnection) -> None:
    pages = granted(connection, 4)
    pages.write(source(4), deadline=soon())
    for bad in range(4):
        keys = list(pages.keys)
        keys[bad] = BlockKey(os.urandom(KEY_BYTES))
        done = make_gate()
        with pytest.raises(StalePage) as caught:
            read_whole(connection, replace(pages, keys=keys), empty_memory(LAYOUT, 4), done)
        assert (caught.value.index, done.open_layers) == (bad, 0)
    read_whole(connection, pages, empty_memory(LAYOUT, 4))


def test_no_header_is_written_before_the_last_layer(connection: DmpConnection) -> None:
    pages, ready = granted(connection, 3), make_gate()
    ready.open(len(ALL_LAYERS) - 1)
    giving_up = threading.Timer(0.05, ready.close)
    giving_up.start()
    with pytest.raises(TransferCancelled):
        pages.write(source(3), ready=ready, deadline=soon())
    giving_up.join()
    written = WrittenPages(LAYOUT, pages.put_id, list(pages.keys), list(pages.extents), [])
    assert set(read_headers(connection, written).failures) == {0, 1, 2}


def test_whole_pages_of_no_live_put_are_refused_and_the_connection_lives(connection: DmpConnection) -> None:
    stranger = begin(connection, os.urandom(PUT_ID_BYTES), list(granted(connection).extents))
    with pytest.raises(PutRefused):
        stranger.write(source(), deadline=soon())
    assert read_headers(connection, write_pages(connection, 1)).failures == {}


def test_a_damaged_page_is_named_whichever_socket_it_came_by(daemon: DaemonProcess, connection: DmpConnection) -> None:
    written = write_pages(connection, 6)
    neighbour = connect(daemon.segment, deadline=soon(), force=TransportKind.SHM)
    memory, reader = neighbour.transport.mapping(), PageReader(LAYOUT, NAMESPACE)
    assert memory is not None
    for page in range(6):
        at = written.extents[page].offset + LAYOUT.layer_offsets()[1]
        memory[at] ^= 1
        done = make_gate()
        with pytest.raises(DamagedPage) as caught:
            read_headers(connection, written).read_layers(
                ALL_LAYERS, empty_memory(LAYOUT, 6), done=done, deadline=soon()
            )
        assert (caught.value.index, caught.value.layer) == (page, 1)
        assert done.open_layers <= 1
        with pytest.raises(DamagedPage) as caught:
            reader.read(connection, written.places(), written.keys, empty_memory(LAYOUT, 6), deadline=soon())
        assert (caught.value.index, caught.value.layer) == (page, 1)
        memory[at] ^= 1
    memory.release()
    neighbour.close()


def test_rows_outside_the_callers_memory_are_refused(connection: DmpConnection) -> None:
    pages = read_headers(connection, write_pages(connection, 1))
    for row in (-1, 1, 2**40):
        memory = PageMemory(empty_memory(LAYOUT, 1).layers, np.array([row], dtype=np.int64))
        with pytest.raises((OutOfBounds, ValueError)):
            pages.read_layers(ALL_LAYERS, memory, deadline=soon())


def test_each_layer_is_written_when_it_is_let_through(connection: DmpConnection) -> None:
    pages, data = granted(connection, 3), random_layers(LAYOUT, 3, 2)
    whole, memory, ready = memory_of(LAYOUT, data), empty_memory(LAYOUT, 3), make_gate()
    memory = PageMemory(memory.layers, whole.rows)
    writing = threading.Thread(target=lambda: pages.write_layers(ALL_LAYERS, memory, ready=ready, deadline=soon()))
    writing.start()
    for layer in ALL_LAYERS:
        for (to, _, _), (made, _, _) in zip(memory.layers[layer], whole.layers[layer], strict=True):
            assert isinstance(to, memoryview)
            to[:] = made
        ready.open(layer + 1)
    writing.join()
    pages.write_headers(deadline=soon())
    connection.transport.put_closed(pages.put_id)


def test_a_write_whose_layers_will_never_be_ready_is_given_up(connection: DmpConnection) -> None:
    pages, ready = granted(connection), make_gate()
    ready.open(1)
    threading.Timer(0.05, ready.close).start()
    with pytest.raises(TransferCancelled):
        pages.write_layers(ALL_LAYERS, source(), ready=ready, deadline=soon())
    with pytest.raises(ValueError, match="3 layers"):
        pages.write_headers(deadline=soon())
    assert read_headers(connection, write_pages(connection, 1)).failures == {}


def test_a_write_waits_for_its_layers_no_longer_than_its_deadline(connection: DmpConnection) -> None:
    with pytest.raises(TransportTimeout):
        granted(connection).write_layers(ALL_LAYERS, source(), ready=make_gate(), deadline=time.monotonic() + 0.05)
    assert read_headers(connection, write_pages(connection, 1)).failures == {}


def test_a_put_out_of_time_takes_no_more_pages(connection: DmpConnection) -> None:
    put_id = os.urandom(PUT_ID_BYTES)
    extents = connection.allocate(put_id, 1, LAYOUT.page_bytes, 0.05, deadline=soon())
    ready = make_gate()
    threading.Timer(0.1, lambda: ready.open(3)).start()
    with pytest.raises(PutRefused):
        begin(connection, put_id, extents).write_layers(ALL_LAYERS, source(), ready=ready, deadline=soon())


def test_a_read_from_a_frozen_daemon_ends_by_its_deadline_or_when_cancelled(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = start_daemon()
    connection = connect(daemon.segment, deadline=soon(), force=TransportKind.TCP)
    pages = read_headers(connection, write_pages(connection, 2))
    daemon.freeze()
    with pytest.raises(TransportTimeout):
        pages.read_layers(ALL_LAYERS, empty_memory(LAYOUT, 2), deadline=time.monotonic() + 0.2)
    daemon.thaw()
    pages.read_layers(ALL_LAYERS, empty_memory(LAYOUT, 2), deadline=soon())
    daemon.freeze()
    cancellation = Cancellation()
    threading.Timer(0.1, cancellation.cancel).start()
    with pytest.raises(TransferCancelled):
        pages.read_layers(ALL_LAYERS, empty_memory(LAYOUT, 2), deadline=soon(60.0), cancellation=cancellation)
    daemon.thaw()
    pages.read_layers(ALL_LAYERS, empty_memory(LAYOUT, 2), deadline=soon())
    connection.close()


def test_a_cancelled_read_lets_no_layer_through(connection: DmpConnection) -> None:
    pages = read_headers(connection, write_pages(connection, 2))
    cancellation, done = Cancellation(), make_gate()
    cancellation.cancel()
    with pytest.raises(TransferCancelled):
        pages.read_layers(ALL_LAYERS, empty_memory(LAYOUT, 2), deadline=soon(), done=done, cancellation=cancellation)
    assert done.open_layers == 0


def test_a_daemon_killed_among_page_transfers_is_a_typed_error(
    start_daemon: Callable[..., DaemonProcess], kind: TransportKind
) -> None:
    daemon = start_daemon()
    connection = connect(daemon.segment, deadline=soon(), force=kind)
    written = write_pages(connection, 4)
    pages = read_headers(connection, written)
    has_read = threading.Event()
    killer = threading.Thread(target=lambda: (has_read.wait(20), daemon.kill()))
    killer.start()

    def read_until_it_fails() -> None:
        while True:
            memory = empty_memory(LAYOUT, 4)
            pages.read_layers(ALL_LAYERS, memory, deadline=soon(30.0))
            assert layer_data(memory, 2) == written.data[2]
            has_read.set()

    with pytest.raises(TransportError) as caught:
        read_until_it_fails()
    assert not isinstance(caught.value, TransportTimeout)
    killer.join()
    connection.close()


def test_many_threads_read_over_one_connection(connection: DmpConnection) -> None:
    written = write_pages(connection, 2)
    offset = written.extents[0].offset

    def read(_: int) -> bytes:
        data = bytearray(4096)
        for _ in range(200):
            connection.transport.read_batch([(offset, memoryview(data))], deadline=soon())
        return bytes(data)

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(read, range(8)))) == 1
