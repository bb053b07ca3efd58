"""Messages between a process and a memory-pool daemon, the same over TCP and over the daemon's Unix socket.

    frame   = magic (4) · version (2) · kind (2) · body bytes (4) · payload bytes (8), then body, then payload
    CONTROL   body: one msgpack request                        answered by REPLY
    READ      body: ranges                                     answered by DATA (payload: the ranges' bytes, in order) or REPLY
    WRITE     body: put id, ranges; payload: their bytes       answered by REPLY
    ranges  = offset (8) · size (4), packed, little endian

Answers come in the order of the requests. The first request of a connection is `Attach`. Lengths are checked against the
limits below before anything is allocated.
"""

from __future__ import annotations

import enum
import struct

import msgspec
import numpy as np

from stratakv.wire import PUT_ID_BYTES, Extent

PROTOCOL_VERSION = 1
MAGIC = b"SKVP"
FRAME = struct.Struct("<4sHHIQ")
RANGE_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4")])

CONTROL_BYTES_MAX = 64 * 1024
"""Longest control request."""
REPLY_BYTES_MAX = 4 * 1024 * 1024
"""Longest control reply: the extents of the largest put."""
RANGES_MAX = 16_384
"""Ranges in one frame; larger batches travel in several."""
TRANSFER_BYTES_MAX = 256 * 1024 * 1024
"""Bytes that one frame moves; also the longest single range."""
PUT_PAGES_MAX = 65_536
PUT_TIMEOUT_S_MAX = 600.0


class FrameKind(enum.IntEnum):
    """What the body of a frame is."""

    CONTROL = 1
    READ = 2
    WRITE = 3
    REPLY = 4
    DATA = 5


BODY_BYTES_MAX = {
    FrameKind.CONTROL: CONTROL_BYTES_MAX,
    FrameKind.READ: RANGES_MAX * RANGE_DTYPE.itemsize,
    FrameKind.WRITE: PUT_ID_BYTES + RANGES_MAX * RANGE_DTYPE.itemsize,
    FrameKind.REPLY: REPLY_BYTES_MAX,
    FrameKind.DATA: 0,
}


class RefusalCode(enum.StrEnum):
    """Why a daemon refused a request."""

    MALFORMED = "malformed"
    VERSION = "version"
    EPOCH_CHANGED = "epoch_changed"
    SEGMENT_FULL = "segment_full"
    PUT_REFUSED = "put_refused"
    OUT_OF_BOUNDS = "out_of_bounds"
    TOO_MANY = "too_many"
    NOT_A_MEMBER = "not_a_member"


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all control messages; the class name is the tag."""


class Attach(Message, frozen=True):
    """First request: the caller wants exactly this epoch's memory."""

    protocol: int
    epoch: bytes
    nonce: bytes = b""
    """Of a client that knows the pool's secret, over TCP."""


class Challenge(Message, frozen=True):
    """The daemon knows the secret, and asks whether the client does (`stratakv.pool.auth`)."""

    nonce: bytes
    proof: bytes


class Prove(Message, frozen=True):
    """The client's answer; the daemon's is `Attached`."""

    proof: bytes


class Attached(Message, frozen=True):
    """On the Unix socket the segment's file descriptor comes with this reply."""

    node: str
    epoch: bytes
    size_bytes: int
    engine: str = ""
    """The daemon's transfer engine, if it has one, and where the segment lies in its memory."""
    address: int = 0
    is_limited: bool = False
    """The host wants memory back: nobody should touch more of the segment than needed."""


class Allocate(Message, frozen=True):
    """`count` pages for a put, all or none; asked again with the same put_id it answers the same."""

    put_id: bytes
    count: int
    page_bytes: int
    timeout_s: float
    term: int = 0
    """Of the meta server that granted the put; 0 if that is not known."""


class Extents(Message, frozen=True):
    extents: list[Extent]


class Release(Message, frozen=True):
    """The writer gives its put up; safe to repeat, also for a put the daemon does not know."""

    put_id: bytes


class GetDaemonStats(Message, frozen=True):
    pass


class DaemonStats(Message, frozen=True):
    size_bytes: int
    used_bytes: int
    extents: int
    puts_open: int
    """Puts whose outcome the daemon does not know yet."""
    connections: int
    bytes_read: int
    """Sent to readers over TCP since the start; shared memory is read unseen."""
    bytes_written: int


class Done(Message, frozen=True):
    """The request was carried out and has nothing else to say."""


class Refused(Message, frozen=True):
    code: RefusalCode
    message: str


ControlRequest = Attach | Prove | Allocate | Release | GetDaemonStats
ControlReply = Attached | Challenge | Extents | Done | DaemonStats | Refused

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(ControlRequest).decode
decode_reply = msgspec.msgpack.Decoder(ControlReply).decode


def frame_header(kind: FrameKind, body_bytes: int, payload_bytes: int = 0) -> bytes:
    """The fixed part that opens every frame."""
    return FRAME.pack(MAGIC, PROTOCOL_VERSION, kind, body_bytes, payload_bytes)


class FrameHeader(msgspec.Struct, frozen=True):
    """A frame header that was found well-formed and within the limits."""

    kind: FrameKind
    body_bytes: int
    payload_bytes: int


class MalformedFrame(ValueError):
    """These bytes open no frame of this protocol."""


def parse_frame_header(raw: bytes | bytearray | memoryview) -> FrameHeader:
    """Check magic, version, kind and declared lengths. Raises MalformedFrame; nothing was allocated then."""
    magic, version, kind, body_bytes, payload_bytes = FRAME.unpack(raw)
    if magic != MAGIC:
        raise MalformedFrame("not the pool protocol")
    if version != PROTOCOL_VERSION:
        raise MalformedFrame(
            f"the other end speaks version {version} of the pool protocol, this end {PROTOCOL_VERSION}"
        )
    if kind not in FrameKind.__members__.values():
        raise MalformedFrame(f"unknown kind of frame {kind}")
    known = FrameKind(kind)
    payload_max = TRANSFER_BYTES_MAX if known in (FrameKind.WRITE, FrameKind.DATA) else 0
    if body_bytes > BODY_BYTES_MAX[known] or payload_bytes > payload_max:
        raise MalformedFrame(f"a {known.name} frame of {body_bytes} + {payload_bytes} bytes is beyond the limits")
    return FrameHeader(known, body_bytes, payload_bytes)
