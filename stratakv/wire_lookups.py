"""Messages of `stratakv.wire` by which blocks are looked up. Import them from there."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from stratakv.wire_parts import Message, Place, Segment

_SEGMENT_INDEX = struct.Struct("<H")
_EXTENT = struct.Struct("<qq")


class MatchPrefix(Message, frozen=True):
    """How many leading blocks of `keys` are in the pool, and where."""

    namespace: bytes
    keys: bytes
    lease_s: float = 0.0
    """Pin what is found for so long; 0 asks only for the count (routers do) and returns no places."""
    node: str = ""
    """The reader's own daemon: of several places of a block it is told the one there."""


class Match(Message, frozen=True):
    """Where blocks lie, packed: thousands of places in one message are no thousands of objects for whoever passes them on."""

    num_blocks: int
    segments: list[Segment] = []
    """That at least one block lies in."""
    segment_of: bytes = b""
    """Per block, an index into `segments`: 2 bytes, little-endian."""
    extents: bytes = b""
    """Per block, offset and generation: 8 bytes each, little-endian."""
    lease_id: int = 0

    @classmethod
    def of(cls, places: Sequence[Place], segments: Sequence[Segment], lease_id: int = 0) -> Match:
        """The same from objects."""
        index = {segment.node: at for at, segment in enumerate(segments)}
        segment_of = b"".join(_SEGMENT_INDEX.pack(index[place.node]) for place in places)
        extents = b"".join(_EXTENT.pack(place.offset, place.generation) for place in places)
        return cls(len(places), list(segments), segment_of, extents, lease_id)

    def places(self) -> list[Place]:
        """One for each block; none if only their number was asked for."""
        nodes = [segment.node for segment in self.segments]
        which = _SEGMENT_INDEX.iter_unpack(self.segment_of)
        return [
            Place(nodes[at], *extent) for (at,), extent in zip(which, _EXTENT.iter_unpack(self.extents), strict=True)
        ]


class FindBlocks(Message, frozen=True):
    """Which of `keys` are in the pool, each by itself; they need not be one prefix, and nothing is pinned."""

    namespace: bytes
    keys: bytes


class FoundBlocks(Message, frozen=True):
    missing: list[int]
    """Indexes into the request's keys, ascending."""


class ReleaseLease(Message, frozen=True):
    lease_id: int
