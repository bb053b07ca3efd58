"""Messages between meta server, daemons, workers and DB nodes: msgspec structs, msgpack-encoded, over ZeroMQ ROUTER/DEALER.

A request travels as frames `[request id (8 bytes), payload]`, its reply bears the same id. A reply is the request's reply type
or `Failure`. Keys of consecutive blocks travel packed, 32 bytes each (`stratakv.keys.pack_keys`). Everything that changes
state may be sent again: puts are known by `put_id`, daemons and workers by (name, epoch). Time never travels as a clock
reading, only as a length.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from stratakv.wire_administration import (
    DrainProgress,
    Flush,
    Flushed,
    GetStats,
    ListNamespaces,
    ListPages,
    Namespaces,
    Pages,
    Pinned,
    PinPrefix,
    SetCacheRule,
    SetDraining,
    SetNodeLimit,
    Stats,
    Unpin,
)
from stratakv.wire_events import EventSnapshot, GetEventSnapshot
from stratakv.wire_lookups import FindBlocks, FoundBlocks, Match, MatchPrefix, ReleaseLease
from stratakv.wire_nodes import (
    HeartbeatNode,
    ListNodes,
    MovesTaken,
    NodeOrders,
    Nodes,
    NodeState,
    Reconciled,
    ReconcilePages,
    Registered,
    RegisterNode,
    ReportMoves,
)
from stratakv.wire_owners import ListOwners, OwnerLimit, OwnerState, OwnerStates, SetOwnerLimits
from stratakv.wire_parts import (
    EPOCH_BYTES,
    MESSAGE_BYTES_MAX,
    PROTOCOL_VERSION,
    PUT_ID_BYTES,
    CacheRule,
    Extent,
    Message,
    Move,
    MovedPage,
    NamespaceState,
    PageAt,
    Place,
    Segment,
    WorkerInfo,
    WorkerLoad,
    WorkerRole,
)

__all__ = [
    "EPOCH_BYTES",
    "MESSAGE_BYTES_MAX",
    "PROTOCOL_VERSION",
    "PUT_ID_BYTES",
    "CacheRule",
    "DrainProgress",
    "EventSnapshot",
    "Extent",
    "FindBlocks",
    "Flush",
    "Flushed",
    "FoundBlocks",
    "GetEventSnapshot",
    "GetStats",
    "HeartbeatNode",
    "ListNamespaces",
    "ListNodes",
    "ListOwners",
    "ListPages",
    "Match",
    "MatchPrefix",
    "Message",
    "Move",
    "MovedPage",
    "MovesTaken",
    "NamespaceState",
    "Namespaces",
    "NodeOrders",
    "NodeState",
    "Nodes",
    "OwnerLimit",
    "OwnerState",
    "OwnerStates",
    "PageAt",
    "Pages",
    "PinPrefix",
    "Pinned",
    "Place",
    "ReconcilePages",
    "Reconciled",
    "RegisterNode",
    "Registered",
    "ReleaseLease",
    "ReportMoves",
    "Segment",
    "SetCacheRule",
    "SetDraining",
    "SetNodeLimit",
    "SetOwnerLimits",
    "Stats",
    "Unpin",
    "WorkerInfo",
    "WorkerLoad",
    "WorkerRole",
]


class Failure(Message, frozen=True):
    """The request was refused or failed; `code` is that of a class in stratakv.errors or stratakv.pool.meta_errors."""

    code: str
    message: str
    retryable: bool
    leader: str = ""
    """host:port of the meta server to ask instead, as far as that is known."""


class Done(Message, frozen=True):
    """The request was carried out and has nothing else to say."""


class Hello(Message, frozen=True):
    """First message of a client; also a ping."""

    protocol: int
    role: str
    name: str


class Welcome(Message, frozen=True):
    protocol: int
    server_version: str
    epoch: bytes
    """New at each start of the meta server, and whenever it begins to lead."""
    is_leader: bool = True
    """A meta server that stands by answers this and `GetLeader` only."""
    term: int = 0
    """Of the leader; a higher one than all leaders before had."""
    leader: str = ""
    """host:port of the leader, as far as one that stands by knows it."""
    events_port: int = 0
    """Where the leader publishes what changes, on its host."""


class GetLeader(Message, frozen=True):
    """Who leads; every meta server answers."""


class LeaderState(Message, frozen=True):
    server: str
    """host:port of the one that was asked."""
    is_leader: bool
    leader: str
    """Empty if nobody is known to lead."""
    term: int = 0
    """0 for one that stands by."""
    lease_left_s: float = 0.0
    standbys: list[str] = []
    """As the leader knows them."""
    take_overs: int = 0
    """How often the one that was asked has begun to lead."""


class DemoteLeader(Message, frozen=True):
    """Have the leader give up its lease; for as long as a lease lasts it does not try to lead again."""


class RegisterWorker(Message, frozen=True):
    info: WorkerInfo


class HeartbeatWorker(Message, frozen=True):
    worker: str
    epoch: bytes
    load: WorkerLoad


class WorkerOrders(Message, frozen=True):
    """Reply to a worker's heartbeat."""

    known: bool


class ListWorkers(Message, frozen=True):
    """Workers whose heartbeats arrive."""


class WorkerState(msgspec.Struct, frozen=True):
    info: WorkerInfo
    load: WorkerLoad


class Workers(Message, frozen=True):
    workers: list[WorkerState]


class PutStart(Message, frozen=True):
    """Ask for room for pages; nothing can be found until `PutEnd`."""

    put_id: bytes
    namespace: bytes
    keys: bytes
    page_bytes: int
    block_size: int
    prefer_node: str | None = None
    worker: str = ""
    timeout_s: float = 30.0
    cost_us: int = 0
    """To compute one page again, in microseconds; 0 while that is not known. What a page is worth depends on it."""
    copies_from: str = ""
    """The pages are copied from this node: wanted are those that lie there. If it is drained it gives them up, else they are
    replicas, and only those are wanted that it was ordered to copy. `block_size` may be 0."""
    owner: int = 0
    """The tenant that has the pages computed; 0: none. Copies are of whom the pages are."""


class PutGrant(Message, frozen=True):
    """Room for the missing pages, or for the first of them that fit, all on one segment.

    Pages that are there already, or that another writer is just writing, are not wanted. With an empty `wanted` there is no
    put: nothing is to be ended.
    """

    wanted: list[int]
    """Indexes into the request's keys, ascending."""
    segment: Segment | None = None
    term: int = 0
    """Of the leader that grants it; daemons refuse what leaders of the past have granted."""


class PutEnd(Message, frozen=True):
    """All bytes and headers of the wanted pages are written."""

    put_id: bytes
    epoch: bytes
    """Of the segment that was granted."""
    extents: list[Extent]
    """One for each wanted page, in order."""


class PutRevoke(Message, frozen=True):
    """The writer gives up; its extents may be freed."""

    put_id: bytes


class ReportCorrupt(Message, frozen=True):
    """A reader found a page that is not what the index says; it is taken out of the index and its extent never reused blindly."""

    namespace: bytes
    key: bytes
    place: Place


class FetchAhead(Message, frozen=True):
    """A request that begins with these blocks waits for its turn: those in the pool that lie on disk go back to memory now."""

    namespace: bytes
    keys: bytes


Request = (
    Hello
    | GetLeader
    | DemoteLeader
    | RegisterNode
    | HeartbeatNode
    | ReportMoves
    | ReconcilePages
    | RegisterWorker
    | HeartbeatWorker
    | ListWorkers
    | ListNodes
    | MatchPrefix
    | FindBlocks
    | ReleaseLease
    | PutStart
    | PutEnd
    | PutRevoke
    | ReportCorrupt
    | Flush
    | SetCacheRule
    | ListNamespaces
    | ListPages
    | SetOwnerLimits
    | ListOwners
    | FetchAhead
    | PinPrefix
    | Unpin
    | SetDraining
    | SetNodeLimit
    | GetStats
    | GetEventSnapshot
)
Reply = (
    Failure
    | Done
    | Welcome
    | LeaderState
    | Registered
    | NodeOrders
    | MovesTaken
    | Reconciled
    | WorkerOrders
    | Workers
    | Nodes
    | Match
    | FoundBlocks
    | PutGrant
    | Flushed
    | Namespaces
    | Pages
    | OwnerStates
    | Pinned
    | DrainProgress
    | Stats
    | EventSnapshot
)
ReplyT = TypeVar("ReplyT", bound=Message)

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
