"""Pages by Mooncake's Transfer Engine, over its TCP: as by any other transport, or a typed error."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from stratakv.errors import SetupError
from stratakv.pool import mooncake
from stratakv.pool.dmp_client import DmpConnection, TransportKind, connect
from stratakv.pool.errors import OutOfBounds, PutRefused, TransferCancelled, TransportError
from stratakv.pool.mooncake import TransferEngine, transfer_engine
from stratakv.pool.transport import Cancellation, ReadRange, WriteRange
from stratakv.settings import TransferProtocol
from stratakv.wire import PUT_ID_BYTES
from tests.integration.pool.daemon import MIB, DaemonProcess
from tests.integration.pool.pages import LAYOUT, empty_memory, layer_data, read_headers, soon, write_pages

pytest.importorskip("mooncake.engine", reason="the package is not installed: make mooncake", exc_type=ImportError)
FLAGS = ("--transfer-engine", "tcp")


@pytest.fixture(scope="module")
def engine() -> TransferEngine:
    made = transfer_engine("127.0.0.1", TransferProtocol.TCP)
    assert made is not None
    return made


@pytest.fixture
def offering(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    return start_daemon(flags=FLAGS)


@pytest.fixture
def by_engine(offering: DaemonProcess, engine: TransferEngine) -> Iterator[DmpConnection]:
    connection = connect(offering.segment, deadline=soon(), force=TransportKind.MOONCAKE, engine=engine)
    yield connection
    connection.close()


@pytest.mark.parametrize("other", [TransportKind.SHM, TransportKind.TCP, TransportKind.MOONCAKE])
def test_pages_are_the_same_by_every_transport(
    offering: DaemonProcess, by_engine: DmpConnection, engine: TransferEngine, other: TransportKind
) -> None:
    neighbour = connect(offering.segment, deadline=soon(), force=other, engine=engine)
    for writer, reader in ((by_engine, neighbour), (neighbour, by_engine)):
        written, memory = write_pages(writer, 40), empty_memory(LAYOUT, 40)
        read_headers(reader, written).read_layers(range(3), memory, deadline=soon())
        assert [layer_data(memory, layer) for layer in range(3)] == written.data
    neighbour.close()


def test_ranges_larger_than_the_staging_memory_arrive_whole(
    by_engine: DmpConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake, "SLAB_BYTES", 1000)
    put_id, data, target = os.urandom(PUT_ID_BYTES), os.urandom(4096), bytearray(4096)
    offset = by_engine.allocate(put_id, 1, 4096, 60.0, deadline=soon())[0].offset
    by_engine.transport.write_batch(put_id, [WriteRange(offset, data)], deadline=soon())
    filled: list[int] = []
    by_engine.transport.read_batch(
        [ReadRange(offset, memoryview(target)[:2500]), ReadRange(offset + 2500, memoryview(target)[2500:])],
        deadline=soon(),
        on_range=filled.append,
    )
    assert target == data
    assert filled == sorted(filled)
    assert filled[-1] == 2


def test_the_rules_of_puts_and_of_the_segment_hold(by_engine: DmpConnection) -> None:
    transport = by_engine.transport
    with pytest.raises(PutRefused):
        transport.write_batch(os.urandom(PUT_ID_BYTES), [WriteRange(0, b"x")], deadline=soon())
    for offset in (-1, 16 * MIB - 1, 2**62):
        with pytest.raises(OutOfBounds):
            transport.read_batch([ReadRange(offset, memoryview(bytearray(2)))], deadline=soon())


def test_a_dead_or_frozen_daemon_is_a_typed_error_in_time(offering: DaemonProcess, by_engine: DmpConnection) -> None:
    ranges = [ReadRange(0, memoryview(bytearray(MIB)))]
    by_engine.transport.read_batch(ranges, deadline=soon())
    offering.freeze()
    with pytest.raises(TransportError):
        by_engine.transport.read_batch(ranges, deadline=time.monotonic() + 0.3)
    offering.thaw()
    offering.kill()
    with pytest.raises(TransportError):
        by_engine.transport.read_batch(ranges, deadline=soon())


def test_a_cancelled_transfer_ends(by_engine: DmpConnection) -> None:
    cancellation = Cancellation()
    threading.Timer(0.05, cancellation.cancel).start()
    memory = memoryview(bytearray(8 * MIB))

    def read_until_cancelled() -> None:
        while True:
            by_engine.transport.read_batch([ReadRange(0, memory)], deadline=soon(), cancellation=cancellation)

    with pytest.raises(TransferCancelled):
        read_until_cancelled()
    by_engine.transport.read_batch([ReadRange(0, memory)], deadline=soon())


def test_a_daemon_without_an_engine_is_reached_by_tcp(daemon: DaemonProcess, engine: TransferEngine) -> None:
    with pytest.raises(TransportError, match="no transfer engine in common"):
        connect(daemon.segment, deadline=soon(), force=TransportKind.MOONCAKE, engine=engine)
    connection = connect(daemon.segment, deadline=soon(), engine=engine)
    assert connection.kind is TransportKind.SHM
    connection.close()


def test_rdma_is_refused_where_there_is_no_adapter() -> None:
    if mooncake.ADAPTERS.is_dir() and any(mooncake.ADAPTERS.iterdir()):
        pytest.skip("this machine has an adapter")
    with pytest.raises(SetupError, match="no RDMA adapter"):
        TransferEngine("127.0.0.1", TransferProtocol.RDMA)
