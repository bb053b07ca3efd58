"""Dead, frozen and restarted daemons cost at most the deadline (P3) and end as a typed error, never as wrong bytes (P1)."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable

import pytest

from stratakv.pool import dmp_client
from stratakv.pool.dmp_client import ConnectionCache, DmpConnection, TransportKind, connect
from stratakv.pool.errors import EpochChanged, SegmentFull, TransferCancelled, TransportError, TransportTimeout
from stratakv.pool.transport import Cancellation, ReadRange, WriteRange
from stratakv.wire import PUT_ID_BYTES
from tests.integration.pool.daemon import MIB, DaemonProcess
from tests.integration.pool.pages import soon
from tests.support import eventually, free_port

StartDaemon = Callable[..., DaemonProcess]
DEADLINE_S = 1.0


def granted(connection: DmpConnection, size_bytes: int) -> tuple[bytes, int]:
    """A put of one page of so many bytes, and where it lies."""
    put_id = os.urandom(PUT_ID_BYTES)
    return put_id, connection.allocate(put_id, 1, size_bytes, 60.0, deadline=soon())[0].offset


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_daemon_killed_in_the_middle_of_a_transfer_is_a_typed_error(
    start_daemon: StartDaemon, kind: TransportKind, operation: str
) -> None:
    daemon = start_daemon()
    connection = connect(daemon.segment, deadline=soon(), force=kind)
    put_id, offset = granted(connection, MIB)
    memory = memoryview(bytearray(MIB))
    transport = connection.transport
    has_moved = threading.Event()

    def move_until_it_fails() -> TransportError:
        deadline = soon(30.0)
        while True:
            try:
                if operation == "read":
                    transport.read_batch([ReadRange(offset, memory)], deadline=deadline)
                else:
                    transport.write_batch(put_id, [WriteRange(offset, memory)], deadline=deadline)
            except TransportError as error:
                return error
            has_moved.set()

    killer = threading.Thread(target=lambda: (has_moved.wait(10), daemon.kill()))
    killer.start()
    error = move_until_it_fails()
    killer.join()
    assert not isinstance(error, TransportTimeout)
    with pytest.raises(TransportError):
        connection.stats(deadline=soon())
    with pytest.raises(TransportError):
        connect(daemon.segment, deadline=soon())
    connection.close()


def test_a_frozen_daemon_costs_only_the_deadline(start_daemon: StartDaemon, kind: TransportKind) -> None:
    daemon = start_daemon()
    connection = connect(daemon.segment, deadline=soon(), force=kind)
    daemon.freeze()
    calls: list[Callable[[float], object]] = [
        lambda deadline: connection.allocate(bytes(PUT_ID_BYTES), 1, 4096, 60.0, deadline=deadline),
        lambda deadline: connect(daemon.segment, deadline=deadline, force=kind),
    ]
    if kind is TransportKind.TCP:
        target = memoryview(bytearray(8))
        calls.append(lambda at: connection.transport.read_batch([ReadRange(0, target)], deadline=at))
    for call in calls:
        deadline = time.monotonic() + DEADLINE_S
        with pytest.raises(TransportError):
            call(deadline)
    daemon.thaw()
    connect(daemon.segment, deadline=soon(), force=kind).close()


def test_a_restarted_daemon_is_recognised(start_daemon: StartDaemon) -> None:
    port = free_port()
    first = start_daemon(flags=("--port", str(port)))
    old = first.segment
    first.kill()
    start_daemon(flags=("--port", str(port)))
    with pytest.raises(EpochChanged):
        connect(old, deadline=soon())


def test_a_cancelled_read_ends_at_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    connection = connect(daemon.segment, deadline=soon(), force=TransportKind.TCP)
    target = memoryview(bytearray(MIB))
    connection.transport.read_batch([ReadRange(0, target)], deadline=soon())
    daemon.freeze()
    cancellation = Cancellation()
    threading.Timer(0.1, cancellation.cancel).start()
    with pytest.raises(TransferCancelled):
        connection.transport.read_batch([ReadRange(0, target)], deadline=soon(60.0), cancellation=cancellation)
    daemon.thaw()
    connection.transport.read_batch([ReadRange(0, target)], deadline=soon())
    with pytest.raises(TransferCancelled):
        connection.transport.read_batch([ReadRange(0, target)], deadline=soon(), cancellation=cancellation)
    connection.close()


def test_two_daemons_serve_one_process_each_its_own_memory(start_daemon: StartDaemon, kind: TransportKind) -> None:
    cache = ConnectionCache(force=kind)
    daemons = [start_daemon(node=f"dmp-{n}") for n in range(2)]
    for number, daemon in enumerate(daemons):
        connection = cache.get(daemon.segment, deadline=soon())
        put_id, offset = granted(connection, 4096)
        assert offset == 0
        connection.transport.write_batch(put_id, [WriteRange(0, bytes([number]) * 8)], deadline=soon())
    for number, daemon in enumerate(daemons):
        target = bytearray(8)
        cache.get(daemon.segment, deadline=soon()).transport.read_batch(
            [ReadRange(0, memoryview(target))], deadline=soon()
        )
        assert target == bytes([number]) * 8
    cache.close()


def test_the_cache_connects_once_and_again_after_a_drop(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmp_client, "RETRY_AFTER_S", 0.3)
    daemon = start_daemon()
    cache = ConnectionCache()
    connection = cache.get(daemon.segment, deadline=soon())
    assert connection.kind is TransportKind.SHM
    assert cache.get(daemon.segment, deadline=soon()) is connection
    cache.drop(connection, "a test says so")
    with pytest.raises(TransportError, match="a test says so"):
        cache.get(daemon.segment, deadline=soon())

    def connected_again() -> bool:
        try:
            return cache.get(daemon.segment, deadline=soon()) is not connection
        except TransportError:
            return False

    eventually(connected_again)
    cache.close()


def test_a_full_segment_refuses_the_whole_batch(start_daemon: StartDaemon, kind: TransportKind) -> None:
    connection = connect(start_daemon().segment, deadline=soon(), force=kind)
    with pytest.raises(SegmentFull):
        connection.allocate(bytes(PUT_ID_BYTES), 17, MIB, 60.0, deadline=soon())
    assert connection.stats(deadline=soon()).used_bytes == 0
    assert len(connection.allocate(bytes(PUT_ID_BYTES), 16, MIB, 60.0, deadline=soon())) == 16
    connection.close()


def test_sigterm_ends_the_daemon_with_status_0_and_its_clients_with_an_error(
    start_daemon: StartDaemon, kind: TransportKind
) -> None:
    daemon = start_daemon()
    connection = connect(daemon.segment, deadline=soon(), force=kind)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(10) == 0
    with pytest.raises(TransportError):
        connection.stats(deadline=soon())
    connection.close()


def test_a_taken_port_is_told_with_the_setting(start_daemon: StartDaemon) -> None:
    taken = start_daemon().segment.port
    with pytest.raises(AssertionError, match=f"dmp.port: port {taken} on 127.0.0.1 is taken"):
        start_daemon(flags=("--port", str(taken)))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--node", "../x"), "dmp.node = '../x': expected 1 to 128 printable characters without a slash"),
        (("--node", ""), "dmp.node = ''"),
        (("--host", "127.0.0.256.9"), "dmp.host = 127.0.0.256.9"),
        (("--disk-dir", "/tmp/nowhere", "--disk-bytes", "0"), "dmp.disk_bytes = 0: at least 1048576"),
        (("--port", "65536"), "dmp.port: expected a port, 0 to 65535, got 65536"),
        (("--level", "chatty"), "log.level: expected one of debug, info, warning, error, got 'chatty'"),
    ],
)
def test_settings_that_cannot_be_are_told(start_daemon: StartDaemon, flags: tuple[str, ...], expected: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(expected)):
        start_daemon(flags=flags)
