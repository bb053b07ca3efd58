"""What messages of `stratakv.wire` carry: how daemons, workers, places and rules are described. Import it from there."""

from __future__ import annotations

import enum

import msgspec

PROTOCOL_VERSION = 2
MESSAGE_BYTES_MAX = 16 * 1024 * 1024
"""Larger frames are refused by both sides."""
EPOCH_BYTES = 16
PUT_ID_BYTES = 16


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages; the class name is the tag."""


class WorkerRole(enum.StrEnum):
    """What the router prefers a worker for; every worker can do the whole job."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class Segment(msgspec.Struct, frozen=True, omit_defaults=True):
    """A daemon's memory, or its disk, as others reach it."""

    node: str
    epoch: bytes
    """Places of an older epoch are void. New at each start of the daemon; of a disk, at each new directory."""
    host: str
    port: int
    """The daemon's TCP transport."""
    socket_name: str
    """Abstract Unix socket (without the leading NUL) that hands the segment's memory to processes of the same host; empty
    for a disk."""
    size_bytes: int
    disk_of: str = ""
    """For a disk: the node whose daemon keeps it. Pages get there from that daemon's memory only."""

    @property
    def is_disk(self) -> bool:
        return bool(self.disk_of)


class Extent(msgspec.Struct, frozen=True):
    """One allocated page in a daemon's segment."""

    offset: int
    generation: int
    """The daemon's count of allocations at the time; a page that was reused has another one."""


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where one page lies."""

    node: str
    offset: int
    generation: int


class WorkerInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker as the router sees it."""

    worker: str
    epoch: bytes
    url: str
    role: WorkerRole
    model: str
    """Name that clients use."""
    namespace: bytes
    block_size: int
    max_model_len: int
    node: str | None = None
    """Its local daemon."""
    events: str = ""
    """ZeroMQ endpoint on which it tells which blocks it holds; empty: it does not."""
    replay: str = ""
    """ZeroMQ endpoint at which missed events can be asked for."""


class WorkerLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker says of its state in each heartbeat and under GET /load."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    """Prompt tokens not yet computed of all waiting and running requests."""
    l1_blocks_total: int = 0
    l1_blocks_free: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    load_bytes_per_s: dict[str, float] = {}
    """By tier; 0 or absent while not measured."""
    slowdown: float = 1.0
    """How much longer prefills take now than the worker's profile says."""
    draining: bool = False


class CacheRule(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an operator says of a namespace; 0 is no limit."""

    namespace: bytes
    ttl_s: float = 0.0
    """Pages that nobody has asked for in so long are dropped."""
    memory_bytes_max: int = 0
    """In the memory of all daemons together."""
    disk_bytes_max: int = 0
    is_kept: bool = False
    """Pages stay when room is needed, as long as there is any other page."""


class Move(msgspec.Struct, frozen=True, array_like=True):
    """Copy one page to the daemon's other segment: from memory to disk, or back."""

    extent: Extent
    page_bytes: int
    owner: int = 0
    """Whose page it is. Pages of several owners are copied to another daemon by several puts."""


class MovedPage(msgspec.Struct, frozen=True, array_like=True):
    """A page that lies at two places now."""

    namespace: bytes
    key: bytes
    source: Extent
    target: Extent
    page_bytes: int


class PageAt(msgspec.Struct, frozen=True, array_like=True):
    """One page of a node, as the index has it."""

    namespace: bytes
    key: bytes
    extent: Extent
    page_bytes: int


class NamespaceState(msgspec.Struct, frozen=True):
    namespace: bytes
    models: list[str]
    """Of the workers that use it and are alive."""
    block_size: int
    """0 while no such worker is known."""
    blocks: int
    bytes_by_node: dict[str, int]
    rule: CacheRule
    blocks_by_node: dict[str, int] = {}
