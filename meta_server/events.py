"""Every change of the pool's blocks as one numbered sequence, and snapshots to begin from. No sockets here.

The catalog tells what changes; publishers (`event_socket`, the streams of the KVCM ports) are called with each event and must
not wait. Numbers have no gaps here, so that whoever loses events sees it.
"""

from __future__ import annotations

from collections.abc import Callable

from meta_server.index import BlockIndex
from meta_server.nodes import Node, NodeTable
from meta_server.presence import Clock
from stratakv.keys import KEY_BYTES
from stratakv.wire_events import BlockGroup, EventKind, EventSnapshot, Medium, NodeMark, PoolEvent

EVENT_KEYS_MAX = 1024
"""Blocks in one event; more make several."""
SNAPSHOT_ROWS = 16_384
"""Rows of the index that one part of a snapshot tells of."""
ALIVE_S = 1.0
"""So often, when nothing else happens, is told what the last event was: the loss of the last one is seen, too."""

Publisher = Callable[[PoolEvent], None]


class EventLog:
    """The sequence of one start of the meta server."""

    def __init__(self, epoch: bytes, clock: Clock) -> None:
        self.epoch = epoch
        self.sequence = 0
        self._clock = clock
        self._publishers: list[Publisher] = []
        self._last_at = -ALIVE_S
        self.is_quiet = True
        """Nothing is numbered yet: the index is being rebuilt."""

    def subscribe(self, publisher: Publisher) -> Callable[[], None]:
        """Call it with every event from now on; the result ends that."""
        self._publishers.append(publisher)
        return lambda: self._publishers.remove(publisher)

    def blocks(self, kind: EventKind, node: Node, namespace: bytes, keys: bytes) -> None:
        """Blocks were added to a node, removed from it, or moved to it."""
        for at in range(0, len(keys), EVENT_KEYS_MAX * KEY_BYTES):
            self._tell(kind, node, namespace, keys[at : at + EVENT_KEYS_MAX * KEY_BYTES])

    def node(self, kind: EventKind, node: Node) -> None:
        """A node came, went, or is gone for good."""
        self._tell(kind, node)

    def tick(self) -> None:
        """Time has passed."""
        if self._publishers and self._clock() - self._last_at >= ALIVE_S:
            self._publish(self._alive())

    def tell_alive(self, publisher: Publisher) -> None:
        """To one who has just come: what the last event was."""
        publisher(self._alive())

    def _alive(self) -> PoolEvent:
        return PoolEvent(self.epoch, self.sequence, EventKind.ALIVE)

    def _tell(self, kind: EventKind, node: Node, namespace: bytes = b"", keys: bytes = b"") -> None:
        if self.is_quiet:
            return
        self.sequence += 1
        if self._publishers:
            medium = medium_of(node)
            self._publish(PoolEvent(self.epoch, self.sequence, kind, node.segment.node, medium, namespace, keys))

    def _publish(self, event: PoolEvent) -> None:
        self._last_at = self._clock()
        for publisher in tuple(self._publishers):
            publisher(event)


class Snapshots:
    """Parts of what is there."""

    def __init__(self, events: EventLog, index: BlockIndex, nodes: NodeTable) -> None:
        self._events = events
        self._index = index
        self._nodes = nodes

    def part(self, after: int) -> EventSnapshot:
        """What lies in the rows behind `after`, as of now.

        A block that changes its row between two parts is told of by an event of that time, whether or not a part has it.
        """
        groups, end = self._index.groups(after, SNAPSHOT_ROWS)
        blocks = []
        for namespace, segment, slots in groups:
            node = self._nodes.at(segment)
            assert node is not None, "the index holds pages of a segment that is no more"
            blocks.append(BlockGroup(namespace, node.segment.node, self._index.packed_keys(slots)))
        marks = [NodeMark(node.segment.node, medium_of(node), node.reachable) for node in self._nodes]
        return EventSnapshot(self._events.epoch, self._events.sequence, marks, blocks, end)


def medium_of(node: Node) -> Medium:
    return Medium.DISK if node.segment.is_disk else Medium.MEMORY
