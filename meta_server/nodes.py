"""The daemons and their segments: who is alive, how much room each has, what each still has to free.

Room is counted here at once when a put is granted; the daemon's own figure, from its heartbeats, adds what its other users
hold. Called by the server's dispatch, `puts` and `reclaim`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from meta_server.presence import Clock, Pulse, RetiredEpochs
from stratakv.errors import InvalidRequest
from stratakv.wire import Extent, Move, NodeState, Segment

ORDERS_MAX = 65_536
"""Extents ordered free in one heartbeat's reply."""


@dataclass(slots=True)
class Node:
    """One daemon's current start."""

    segment: Segment
    index: int
    """The segment's number in the block index, never used again."""
    pulse: Pulse
    free_from: float
    """Monotonic time before which nothing is ordered free: readers may hold leases of an earlier start of this server."""
    reachable: bool = False
    """As the block index was last told."""
    committed_bytes: int = 0
    committed_pages: int = 0
    pending_bytes: int = 0
    freeing_bytes: int = 0
    foreign_bytes: int = 0
    """What the daemon says is in use beyond the three above."""
    freeing: dict[Extent, tuple[int, int]] = field(default_factory=dict)
    """Ordered free and not yet reported freed: the removal it belongs to, and its size in bytes."""
    moving: dict[Extent, tuple[float, int]] = field(default_factory=dict)
    """Being copied to the daemon's other segment: until when that is awaited, oldest first, and its size in bytes."""
    moves_waiting: list[Move] = field(default_factory=list)
    """Those of `moving` that the daemon has not been told of."""
    is_reconciled: bool = True
    """For a disk: it has said which of its pages are whole."""
    found: set[Extent] = field(default_factory=set)
    """What it has said so far."""
    read_only: bool = False
    limit_bytes: int | None = None
    """Of the segment, no more is to be used; 0: all of it. None until the operator or the daemon has told."""
    is_draining: bool = False
    drains_whole: bool = False
    """Also of what was never read."""
    moved_away: int = 0
    """Pages, since it is draining."""
    move_failures: Counter[Extent] = field(default_factory=Counter)
    """By page, since it is draining."""

    @property
    def capacity_bytes(self) -> int:
        return min(self.limit_bytes or self.segment.size_bytes, self.segment.size_bytes)

    @property
    def moving_bytes(self) -> int:
        return sum(size for _, size in self.moving.values())

    @property
    def used_bytes(self) -> int:
        return self.committed_bytes + self.pending_bytes + self.freeing_bytes + self.foreign_bytes

    @property
    def free_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.used_bytes)

    @property
    def staying_bytes(self) -> int:
        """In use, and not about to be freed."""
        return self.used_bytes - self.freeing_bytes

    def report_used(self, used_bytes: int) -> None:
        """Take over the daemon's own figure."""
        known = self.committed_bytes + self.pending_bytes + self.freeing_bytes
        self.foreign_bytes = max(0, min(used_bytes, self.segment.size_bytes) - known)

    def order_free(self, removal_id: int, extents: Iterable[Extent], page_bytes: Iterable[int]) -> None:
        for extent, size in zip(extents, page_bytes, strict=True):
            self.freeing[extent] = (removal_id, size)

    def orders(self) -> list[Extent]:
        return list(islice(self.freeing, ORDERS_MAX))

    def freed(self, extents: Iterable[Extent]) -> list[int]:
        """The daemon took these back; the removals they belonged to, one for each."""
        removals = []
        for extent in extents:
            order = self.freeing.pop(extent, None)
            if order is not None:
                removals.append(order[0])
                self.freeing_bytes -= order[1]
        return removals


class NodeTable:
    """Nodes by name and by segment number."""

    def __init__(self, clock: Clock, heartbeat_s: float, retired: Iterable[bytes] = ()) -> None:
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._retired = RetiredEpochs(retired)
        self._by_name: dict[str, Node] = {}
        self._by_index: dict[int, Node] = {}
        self._next_index = 0

    def __iter__(self) -> Iterator[Node]:
        return iter(self._by_name.values())

    def get(self, name: str) -> Node | None:
        return self._by_name.get(name)

    def at(self, index: int) -> Node | None:
        """The node of a segment number; None if that epoch is over."""
        return self._by_index.get(index)

    def of_epoch(self, name: str, epoch: bytes) -> Node | None:
        """The node, if this is its current epoch."""
        node = self._by_name.get(name)
        return node if node is not None and node.segment.epoch == epoch else None

    def check_epoch(self, segment: Segment) -> None:
        """Raises StaleEpoch for an epoch that is over, InvalidRequest for one that another node has."""
        self._retired.refuse(segment.node, segment.epoch)
        for node in self:
            if node.segment.epoch == segment.epoch and node.segment.node != segment.node:
                raise InvalidRequest(f"node {segment.node}: node {node.segment.node} has the same epoch")

    def add(self, segment: Segment, *, quiet_s: float = 0.0) -> Node:
        """A new epoch, nothing of which is freed for `quiet_s`; the caller has removed the one before."""
        pulse = Pulse(self._clock, self._heartbeat_s)
        free_from = self._clock() + quiet_s
        node = Node(segment, self._next_index, pulse, free_from, is_reconciled=not segment.is_disk)
        self._next_index += 1
        for disk in (n for n in self if n.segment.disk_of == segment.node):
            disk.is_draining = False  # its daemon was started anew
        self._by_name[segment.node] = self._by_index[node.index] = node
        return node

    def retire(self, node: Node) -> None:
        """The node's epoch is over."""
        self._retired.add(node.segment.epoch)
        del self._by_name[node.segment.node], self._by_index[node.index]

    def states(self) -> list[NodeState]:
        """The nodes whose heartbeats arrive."""
        return [
            NodeState(n.segment, n.used_bytes, n.free_bytes, n.read_only, n.is_draining, n.limit_bytes or 0)
            for n in self
            if n.reachable
        ]
