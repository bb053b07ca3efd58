"""What the meta server tells of changes as they happen: events, and the snapshot that a follower begins from.

Events come over PUB, one message each; snapshots are asked for as any request (`stratakv.wire`). `stratakv.pool.follower` puts
them together.
"""

from __future__ import annotations

import enum

import msgspec

from stratakv.wire_parts import Message


class EventKind(enum.IntEnum):
    """What has happened; the numbers are those of `event_service.proto`."""

    ALIVE = 0
    """Nothing since `sequence`."""
    BLOCKS_ADDED = 1
    """`keys` lie at `node` now."""
    BLOCKS_REMOVED = 2
    """`keys` lie nowhere any more."""
    BLOCKS_MOVED = 3
    """`keys` lie at `node` now, and no longer where they did: another tier, or the node they were on is drained."""
    NODE_UP = 4
    """What lies at `node` can be read."""
    NODE_DOWN = 5
    """What lies at `node` cannot be read until it is up again."""
    NODE_GONE = 6
    """Nothing lies at `node` any more."""


class Medium(enum.StrEnum):
    """Kinds of memory that a node has."""

    MEMORY = "mem"
    DISK = "disk"


class PoolEvent(msgspec.Struct, frozen=True, array_like=True):
    """One change; all changes of one meta server are one sequence."""

    epoch: bytes
    """Of the meta server's start; each counts from 1."""
    sequence: int
    """One more than that of the event before; a greater step is a gap."""
    kind: EventKind
    node: str = ""
    medium: Medium = Medium.MEMORY
    """Of the node."""
    namespace: bytes = b""
    keys: bytes = b""
    """Packed."""


class NodeMark(msgspec.Struct, frozen=True, array_like=True):
    """A node that blocks may lie at."""

    node: str
    medium: Medium
    is_up: bool


class BlockGroup(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that lie at one node."""

    namespace: bytes
    node: str
    keys: bytes


class GetEventSnapshot(Message, frozen=True):
    """What is there now, part by part."""

    after: int = 0
    """`EventSnapshot.next` of the part before; 0 for the first."""


class EventSnapshot(Message, frozen=True):
    """One part. Parts are of different times: between two of them lie the events of between."""

    epoch: bytes
    sequence: int
    """Of the last event before this part was made."""
    nodes: list[NodeMark]
    """All there are."""
    blocks: list[BlockGroup]
    next: int
    """To be asked for next; 0 behind the last part."""


encode_event = msgspec.msgpack.Encoder().encode
decode_event = msgspec.msgpack.Decoder(PoolEvent).decode
