"""What a prefill worker tells the worker that follows one of its requests, as it happens.

    POST /handovers {"request_id": …}    answered by frames: length (4 bytes, big-endian), then one msgpack message
    Placed · Written …                   for every put that holds blocks of the prompt; several may be told in turns
    Answered or GivenUp                  the first token, or that there will be none
    Saved                                no more is going to be written
    Alive                                nothing to say

Used by both workers; no I/O here.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from stratakv.wire import Extent, Segment
from workers.handover.errors import MalformedMessage

PATH = "/handovers"
FRAME_BYTES_MAX = 16 * 1024 * 1024
_LENGTH_BYTES = 4


class Follow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of the request for them."""

    request_id: str


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all of them; the class name is the tag."""


class Placed(Message, frozen=True):
    """Pages of these keys (packed) are going to be written to these extents."""

    put: int
    """Number of the put within this hand-over."""
    namespace: bytes
    segment: Segment
    keys: bytes
    extents: list[Extent]


class Written(Message, frozen=True):
    """These layers of every page of a put lie at their place, and are what these checksums say."""

    put: int
    layers: list[int]
    checksums: bytes
    """[layer][page], 8 bytes each, little-endian."""


class Answered(Message, frozen=True):
    """The prompt is computed."""

    token_ids: list[int]
    finish_reason: str


class GivenUp(Message, frozen=True):
    """The request ended without an answer."""

    reason: str


class Saved(Message, frozen=True):
    """Nothing more is written for this prompt; whether all its full blocks can be found in the pool."""

    is_whole: bool


class Alive(Message, frozen=True):
    """The sender lives; told when there is nothing else to tell."""


AnyMessage = Placed | Written | Answered | GivenUp | Saved | Alive

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(AnyMessage).decode


def frame(message: AnyMessage) -> bytes:
    """One message as it travels."""
    body = _encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameReader:
    """Bytes in any pieces → messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[AnyMessage]:
        """The messages that are whole now. Raises MalformedMessage; then no more can be read."""
        self._rest += data
        while len(self._rest) >= _LENGTH_BYTES:
            size = int.from_bytes(self._rest[:_LENGTH_BYTES], "big")
            if size > FRAME_BYTES_MAX:
                raise MalformedMessage(f"a message of {size} bytes is longer than {FRAME_BYTES_MAX}")
            stop = _LENGTH_BYTES + size
            if len(self._rest) < stop:
                return
            body, self._rest = self._rest[_LENGTH_BYTES:stop], self._rest[stop:]
            try:
                yield _decode(body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise MalformedMessage(f"not a message of a hand-over: {error}") from error
