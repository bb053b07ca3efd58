"""Pages come back bit-identical or not at all (P1): every flipped bit, torn, stale and misdirected pages are found."""

from __future__ import annotations

import os
import threading

import pytest

from stratakv._native import make_gate
from stratakv.keys import BlockKey, Namespace
from stratakv.layout import KVLayout, packed_header_bytes
from stratakv.pool.dmp_client import DmpConnection, TransportKind, connect
from stratakv.pool.errors import DamagedPage, PageError, StalePage
from stratakv.pool.pages import PageReader, PageWriter
from stratakv.wire import PUT_ID_BYTES, Place
from tests.integration.pool.daemon import DaemonProcess
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


def read_all(connection: DmpConnection, written: WrittenPages) -> list[list[tuple[bytes, ...]]]:
    memory = empty_memory(written.layout, len(written.keys))
    layers = range(len(written.layout.layers))
    read_headers(connection, written).read_layers(layers, memory, deadline=soon())
    return [layer_data(memory, layer) for layer in layers]


@pytest.mark.parametrize("reader_kind", [TransportKind.SHM, TransportKind.TCP])
def test_what_was_written_over_either_transport_is_read_over_either(
    daemon: DaemonProcess, connection: DmpConnection, reader_kind: TransportKind
) -> None:
    written = write_pages(connection, 5)
    reader = connect(daemon.segment, deadline=soon(), force=reader_kind)
    assert read_all(reader, written) == written.data
    reader.close()


def test_large_batches_arrive_in_layer_order(connection: DmpConnection) -> None:
    layout = KVLayout.for_attention(
        num_layers=30, num_kv_heads=1, head_dim=8, page_tokens=4, dtype="fp16", element_bytes=2
    )
    written = write_pages(connection, 200, layout=layout, seed=1)
    pages = read_headers(connection, written)
    memory = empty_memory(layout, 200)
    done = make_gate()
    reading = threading.Thread(target=lambda: pages.read_layers(range(30), memory, done=done, deadline=soon()))
    reading.start()
    for layer in range(30):
        assert done.wait(layer + 1, soon())
        assert layer_data(memory, layer) == written.data[layer]
    reading.join()


def test_pages_of_some_indices_can_be_read_alone(connection: DmpConnection) -> None:
    written = write_pages(connection, 4, seed=2)
    memory = empty_memory(LAYOUT, 2)
    read_headers(connection, written).take([3, 1]).read_layers([1], memory, deadline=soon())
    assert layer_data(memory, 1) == [written.data[1][3], written.data[1][1]]


def test_every_single_flipped_bit_of_header_and_data_is_found(daemon: DaemonProcess) -> None:
    connection = connect(daemon.segment, deadline=soon(), force=TransportKind.SHM)
    written = write_pages(connection, 1, seed=3)
    memory = connection.transport.mapping()
    assert memory is not None
    start = written.extents[0].offset
    data_start = start + LAYOUT.layer_offsets()[0]
    header = range(start, start + packed_header_bytes(len(LAYOUT.layers)))
    data = range(data_start, data_start + LAYOUT.data_bytes)
    for at in (*header, *data):
        for bit in range(8):
            memory[at] ^= 1 << bit
            pages = read_headers(connection, written)
            if at in header:
                assert isinstance(pages.failures[0], PageError), f"bit {bit} of byte {at - start}"
            else:
                with pytest.raises(DamagedPage):
                    pages.read_layers(range(3), empty_memory(LAYOUT, 1), deadline=soon())
            memory[at] ^= 1 << bit
    assert read_all(connection, written) == written.data
    memory.release()
    connection.close()


def test_a_page_without_its_header_is_not_read(connection: DmpConnection) -> None:
    put_id = os.urandom(PUT_ID_BYTES)
    extents = connection.allocate(put_id, 1, LAYOUT.page_bytes, 60.0, deadline=soon())
    keys = [BlockKey(b"k" * 32)]
    pages = PageWriter(LAYOUT, NAMESPACE).begin(connection, put_id, extents, keys)
    pages.write_layers(range(3), memory_of(LAYOUT, random_layers(LAYOUT, 1, 4)), deadline=soon())
    written = WrittenPages(LAYOUT, put_id, keys, extents, [])
    assert isinstance(read_headers(connection, written).failures[0], PageError)
    connection.release(put_id, deadline=soon())


def test_a_page_with_a_layer_missing_is_damaged(connection: DmpConnection) -> None:
    written = write_pages(connection, 2, seed=5)
    torn = PageWriter(LAYOUT, NAMESPACE).begin(connection, written.put_id, written.extents[1:], written.keys[1:])
    torn.write_layers([2], memory_of(LAYOUT, random_layers(LAYOUT, 1, 6)), deadline=soon())
    pages = read_headers(connection, written)
    done = make_gate()
    with pytest.raises(DamagedPage) as caught:
        pages.read_layers(range(3), empty_memory(LAYOUT, 2), done=done, deadline=soon())
    assert done.open_layers == 2
    assert (caught.value.index, caught.value.layer) == (1, 2)


def test_another_page_than_the_one_asked_for_is_stale(connection: DmpConnection) -> None:
    written = write_pages(connection, 2, seed=7)
    first, second = written.places()
    reader = PageReader(LAYOUT, NAMESPACE)
    reused = Place(first.node, first.offset, first.generation + 1)
    for place, key in ((second, written.keys[0]), (reused, written.keys[0]), (first, BlockKey(b"x" * 32))):
        pages = reader.read_headers(connection, [place, second], [key, written.keys[1]], deadline=soon())
        assert isinstance(pages.failures[0], StalePage)
        assert list(pages.failures) == [0]
        with pytest.raises(ValueError, match="failed"):
            pages.read_layers([0], empty_memory(LAYOUT, 2), deadline=soon())
    stranger = PageReader(LAYOUT, Namespace(b"m" * 16))
    pages = stranger.read_headers(connection, [first], written.keys[:1], deadline=soon())
    assert isinstance(pages.failures[0], StalePage)


def test_a_page_of_another_layout_is_refused(connection: DmpConnection) -> None:
    written = write_pages(connection, 1, seed=8)
    other = KVLayout.for_attention(
        num_layers=3, num_kv_heads=1, head_dim=16, page_tokens=2, dtype="fp16", element_bytes=2
    )
    pages = PageReader(other, NAMESPACE).read_headers(connection, written.places(), written.keys, deadline=soon())
    assert isinstance(pages.failures[0], StalePage)


def test_headers_are_written_only_when_all_layers_are(connection: DmpConnection) -> None:
    put_id = os.urandom(PUT_ID_BYTES)
    extents = connection.allocate(put_id, 1, LAYOUT.page_bytes, 60.0, deadline=soon())
    pages = PageWriter(LAYOUT, NAMESPACE).begin(connection, put_id, extents, [BlockKey(b"k" * 32)])
    pages.write_layers([0], memory_of(LAYOUT, random_layers(LAYOUT, 1, 9)), deadline=soon())
    with pytest.raises(ValueError, match="2 layers"):
        pages.write_headers(deadline=soon())
    connection.release(put_id, deadline=soon())
