"""Whatever bytes a client sends harm at most its own connection (P6), and no declared length is believed."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratakv.config import NATIVE_ENV
from stratakv.pool import messages
from stratakv.pool.control import receive_reply
from stratakv.pool.dmp_client import DmpConnection, TransportKind, connect
from stratakv.pool.errors import OutOfBounds, ProtocolMismatch, PutRefused, TransportError
from stratakv.pool.framing import receive_exactly, send_all
from stratakv.pool.messages import FRAME, FrameKind, frame_header
from stratakv.pool.transport import ReadRange, WriteRange
from stratakv.wire import PUT_ID_BYTES
from tests.integration.pool.daemon import MIB, DaemonProcess
from tests.integration.pool.pages import read_headers, soon, write_pages
from tests.support import eventually


@pytest.fixture(scope="module", params=["native", "python"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One that answers with the C++ module, and one without."""
    env = {NATIVE_ENV: "0"} if request.param == "python" else {}
    with DaemonProcess(tmp_path_factory.mktemp("dmp") / "log", env=env) as running:
        yield running


@pytest.fixture
def bystander(daemon: DaemonProcess) -> Iterator[DmpConnection]:
    """Another client's connection, which must not notice anything."""
    connected = connect(daemon.segment, deadline=soon(), force=TransportKind.TCP)
    yield connected
    connected.stats(deadline=soon())
    connected.close()


def dial(daemon: DaemonProcess) -> socket.socket:
    return socket.create_connection((daemon.segment.host, daemon.segment.port), timeout=10)


def attach(daemon: DaemonProcess) -> socket.socket:
    sock = dial(daemon)
    body = messages.encode(messages.Attach(messages.PROTOCOL_VERSION, daemon.segment.epoch))
    send_all(sock, [frame_header(FrameKind.CONTROL, len(body)) + body], soon())
    receive_reply(sock, messages.Attached, soon())
    return sock


def is_closed(sock: socket.socket) -> bool:
    """Read to the end; True when the daemon has closed."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return True


def is_closed_after(sock: socket.socket, data: bytes) -> bool:
    """Send, and read to the end. The daemon may close at the first bad byte, before all is sent."""
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET)
    return is_closed(sock)


@settings(max_examples=50)
@given(garbage=st.binary(min_size=FRAME.size, max_size=200))
def test_garbage_closes_only_its_connection(daemon: DaemonProcess, bystander: DmpConnection, garbage: bytes) -> None:
    with dial(daemon) as sock:
        assert is_closed_after(sock, garbage)


@settings(max_examples=50)
@given(kind=st.sampled_from(list(FrameKind)), body=st.binary(max_size=100), payload_bytes=st.integers(0, 100))
def test_well_framed_garbage_closes_only_its_connection(
    daemon: DaemonProcess, bystander: DmpConnection, kind: FrameKind, body: bytes, payload_bytes: int
) -> None:
    with attach(daemon) as sock:
        assert is_closed_after(sock, frame_header(kind, len(body), payload_bytes) + body + bytes(payload_bytes))


@pytest.mark.parametrize("kind", list(FrameKind))
@pytest.mark.parametrize(("body_bytes", "payload_bytes"), [(2**32 - 1, 0), (16, 2**63)])
def test_a_huge_declared_length_allocates_nothing(
    daemon: DaemonProcess, bystander: DmpConnection, kind: FrameKind, body_bytes: int, payload_bytes: int
) -> None:
    before = psutil.Process(daemon.process.pid).memory_info().vms
    with attach(daemon) as sock:
        sock.sendall(frame_header(kind, body_bytes, payload_bytes))
        assert is_closed(sock)
    assert psutil.Process(daemon.process.pid).memory_info().vms - before < 256 * MIB


def test_bytes_are_not_served_before_attach(daemon: DaemonProcess, bystander: DmpConnection) -> None:
    body = struct.pack("<QI", 0, 8)
    with dial(daemon) as sock:
        sock.sendall(frame_header(FrameKind.READ, len(body)) + body)
        assert is_closed(sock)


def test_another_protocol_version_is_refused_with_both_named(daemon: DaemonProcess) -> None:
    with dial(daemon) as sock:
        body = messages.encode(messages.Attach(99, daemon.segment.epoch))
        send_all(sock, [frame_header(FrameKind.CONTROL, len(body)) + body], soon())
        with pytest.raises(ProtocolMismatch, match="version 1, the client 99"):
            receive_reply(sock, messages.Attached, soon())


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.allocate(b"short", 1, 4096, 1.0, deadline=soon()),
        lambda c: c.allocate(bytes(PUT_ID_BYTES), 0, 4096, 1.0, deadline=soon()),
        lambda c: c.allocate(bytes(PUT_ID_BYTES), 2**40, 4096, 1.0, deadline=soon()),
        lambda c: c.allocate(bytes(PUT_ID_BYTES), 1, 4095, 1.0, deadline=soon()),
        lambda c: c.allocate(bytes(PUT_ID_BYTES), 1, 4096, float("nan"), deadline=soon()),
    ],
)
def test_a_malformed_allocate_is_refused(connection: DmpConnection, call: Callable[[DmpConnection], object]) -> None:
    with pytest.raises(TransportError):
        call(connection)


@pytest.mark.parametrize("offset", [-1, 16 * MIB - 4, 16 * MIB, 2**62])
def test_reads_and_writes_outside_the_segment_are_refused(connection: DmpConnection, offset: int) -> None:
    put_id = os.urandom(PUT_ID_BYTES)
    connection.allocate(put_id, 1, 4096, 60.0, deadline=soon())
    with pytest.raises(OutOfBounds):
        connection.transport.read_batch([ReadRange(offset, memoryview(bytearray(8)))], deadline=soon())
    with pytest.raises(OutOfBounds):
        connection.transport.write_batch(put_id, [WriteRange(offset, bytes(8))], deadline=soon())
    connection.release(put_id, deadline=soon())


def test_writes_without_a_live_put_are_refused(connection: DmpConnection) -> None:
    written = write_pages(connection, 1)
    ranges = [WriteRange(written.extents[0].offset, bytes(8))]
    with pytest.raises(PutRefused):
        connection.transport.write_batch(os.urandom(PUT_ID_BYTES), ranges, deadline=soon())
    connection.release(written.put_id, deadline=soon())
    with pytest.raises(PutRefused):
        connection.transport.write_batch(written.put_id, ranges, deadline=soon())


def test_what_a_leader_of_the_past_has_granted_is_refused(connection: DmpConnection) -> None:
    first, second = os.urandom(PUT_ID_BYTES), os.urandom(PUT_ID_BYTES)
    term = time.time_ns()
    connection.allocate(first, 1, 4096, 60.0, deadline=soon(), term=term)
    with pytest.raises(PutRefused, match="no longer leads"):
        connection.allocate(second, 1, 4096, 60.0, deadline=soon(), term=term - 1)
    connection.allocate(second, 1, 4096, 60.0, deadline=soon(), term=term + 1)
    for put_id in (first, second):
        connection.release(put_id, deadline=soon())


def test_a_put_out_of_time_takes_no_more_bytes(connection: DmpConnection) -> None:
    put_id = os.urandom(PUT_ID_BYTES)
    extent = connection.allocate(put_id, 1, 4096, 0.2, deadline=soon())[0]

    def is_refused() -> bool:
        try:
            connection.transport.write_batch(put_id, [WriteRange(extent.offset, b"x")], deadline=soon())
        except PutRefused:
            return True
        return False

    eventually(is_refused)


def test_tcp_writes_beyond_the_pages_of_the_put_are_refused_and_the_connection_lives(daemon: DaemonProcess) -> None:
    connection = connect(daemon.segment, deadline=soon(), force=TransportKind.TCP)
    victim = write_pages(connection, 1)
    put_id = os.urandom(PUT_ID_BYTES)
    connection.allocate(put_id, 1, 4096, 60.0, deadline=soon())
    with pytest.raises(OutOfBounds):
        connection.transport.write_batch(
            put_id, [WriteRange(victim.extents[0].offset, bytes(3 * MIB))], deadline=soon()
        )
    connection.stats(deadline=soon())
    connection.close()


def test_a_client_that_stops_in_the_middle_of_a_write_is_forgotten(daemon: DaemonProcess) -> None:
    connection = connect(daemon.segment, deadline=soon(), force=TransportKind.TCP)
    put_id = os.urandom(PUT_ID_BYTES)
    extent = connection.allocate(put_id, 1, MIB, 60.0, deadline=soon())[0]
    body = put_id + struct.pack("<QI", extent.offset, MIB)
    with attach(daemon) as sock:
        sock.sendall(frame_header(FrameKind.WRITE, len(body), MIB) + body + bytes(1000))
    transport, content = connection.transport, b"\x07" * MIB

    def is_whole() -> bool:
        """Once what was sent before has been read: the daemon's threads may take it up later than this write."""
        transport.write_batch(put_id, [WriteRange(extent.offset, content)], deadline=soon())
        target = bytearray(MIB)
        transport.read_batch([ReadRange(extent.offset, memoryview(target))], deadline=soon())
        return target == content

    eventually(is_whole)
    connection.release(put_id, deadline=soon())
    connection.close()


def test_connections_beyond_the_limit_are_refused(start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon(flags=("--connections-max", "2"))
    first, _second = (connect(daemon.segment, deadline=soon()) for _ in range(2))
    with pytest.raises(TransportError):
        connect(daemon.segment, deadline=soon(), force=TransportKind.TCP)
    first.close()

    def has_room() -> bool:
        try:
            connect(daemon.segment, deadline=soon()).close()
        except TransportError:
            return False
        return True

    eventually(has_room)


def test_a_silent_connection_is_closed(start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon(flags=("--idle-timeout-s", "0.2"))
    with attach(daemon) as sock:
        sock.settimeout(10)
        assert sock.recv(1) == b""


def test_a_client_that_was_silent_for_long_goes_on_as_before(
    start_daemon: Callable[..., DaemonProcess], kind: TransportKind
) -> None:
    daemon = start_daemon(flags=("--idle-timeout-s", "0.2"))
    connection = connect(daemon.segment, deadline=soon(), force=kind)
    written = write_pages(connection, 1)
    with attach(daemon) as later:
        # This one fell silent after the connection did, so the daemon is through with both of them.
        assert is_closed(later)
    assert connection.stats(deadline=soon()).used_bytes == written.layout.page_bytes
    assert not read_headers(connection, written).failures
    connection.close()
    with pytest.raises(TransportError):
        connection.stats(deadline=soon())


def test_what_was_moved_is_counted(daemon: DaemonProcess) -> None:
    connection = connect(daemon.segment, deadline=soon(), force=TransportKind.TCP)
    before = connection.stats(deadline=soon())
    put_id = os.urandom(PUT_ID_BYTES)
    extents = connection.allocate(put_id, 2, 4096, 60.0, deadline=soon())
    connection.transport.write_batch(put_id, [WriteRange(e.offset, b"x" * 100) for e in extents], deadline=soon())
    into = memoryview(bytearray(30))
    connection.transport.read_batch([ReadRange(extents[0].offset, into)], deadline=soon())

    def is_counted() -> bool:
        # Counted once it has been sent, which the reader may see first.
        after = connection.stats(deadline=soon())
        return (after.bytes_written - before.bytes_written, after.bytes_read - before.bytes_read) == (200, 30)

    eventually(is_counted)
    connection.release(put_id, deadline=soon())
    connection.close()


def test_a_refused_write_is_taken_off_the_wire_and_the_next_one_is_served(daemon: DaemonProcess) -> None:
    good, unknown = os.urandom(PUT_ID_BYTES), os.urandom(PUT_ID_BYTES)
    connection = connect(daemon.segment, deadline=soon(), force=TransportKind.TCP)
    extent = connection.allocate(good, 1, 4096, 60.0, deadline=soon())[0]
    frames = []
    for put_id, size in ((unknown, 4096), (good, 4096), (good, 4097), (good, 1)):
        body = put_id + struct.pack("<QI", extent.offset, size)
        frames.append(frame_header(FrameKind.WRITE, len(body), size) + body + bytes(size))
    with attach(daemon) as sock:
        sock.sendall(b"".join(frames))
        with pytest.raises(PutRefused):
            receive_reply(sock, messages.Done, soon())
        receive_reply(sock, messages.Done, soon())
        with pytest.raises(OutOfBounds):
            receive_reply(sock, messages.Done, soon())
        receive_reply(sock, messages.Done, soon())
    connection.release(good, deadline=soon())
    connection.close()


def test_frames_may_arrive_in_pieces(daemon: DaemonProcess) -> None:
    with attach(daemon) as sock:
        frame = frame_header(FrameKind.READ, 12) + struct.pack("<QI", 0, 8)
        for at in range(len(frame)):
            sock.sendall(frame[at : at + 1])
            time.sleep(0)
        assert len(receive_exactly(sock, FRAME.size + 8, soon())) == FRAME.size + 8


def test_without_shared_memory_a_daemon_of_this_host_is_reached_over_tcp(daemon: DaemonProcess) -> None:
    for shared_memory, kind in ((True, TransportKind.SHM), (False, TransportKind.TCP)):
        connection = connect(daemon.segment, deadline=soon(), shared_memory=shared_memory)
        assert connection.kind is kind
        connection.close()
