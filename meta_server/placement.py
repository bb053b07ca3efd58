"""Which segment new pages go to. Disks take pages from their own daemon only, draining daemons take none."""

from __future__ import annotations

from collections.abc import Callable

from meta_server.nodes import Node, NodeTable
from stratakv.pool.meta_errors import PoolFull

MakeRoom = Callable[[Node, int], None]


class Placement:
    """Chooses among the nodes as they are now."""

    def __init__(self, nodes: NodeTable, make_room: MakeRoom, *, high: float, low: float) -> None:
        """Shares of a segment in use: beyond `high` pages would be removed again; up to `low` is room to spare."""
        self._nodes = nodes
        self._make_room = make_room
        self._high = high
        self._low = low

    def for_put(self, prefer_node: str | None, num_pages: int, page_bytes: int) -> Node:
        """The preferred node if all fits, else the one with most room; raises PoolFull if that has none."""
        needed = num_pages * page_bytes
        nodes = self._takers()
        preferred = [node for node in nodes if node.segment.node == prefer_node]
        roomiest = max(nodes, key=lambda node: node.free_bytes, default=None)
        for node in preferred or ([roomiest] if roomiest else []):
            if node.free_bytes >= needed:
                return node
            self._make_room(node, needed)
        if roomiest is None:
            raise PoolFull("no memory-pool daemon is alive")
        if roomiest.free_bytes < page_bytes:
            raise PoolFull("no segment has room for a page now; cold pages are being reclaimed")
        return roomiest

    def for_copies(self, source: Node, page_bytes: int) -> Node:
        """The other node with most room that nothing has to leave for; raises PoolFull."""
        roomiest = max(self.copy_targets(source), key=self.room_for_copies, default=None)
        if roomiest is None or self.room_for_copies(roomiest) < page_bytes:
            raise PoolFull("no other segment has room for a page")
        return roomiest

    def copy_targets(self, source: Node) -> list[Node]:
        return [node for node in self._takers() if node is not source]

    def room_for_copies(self, node: Node) -> int:
        """Bytes that fit before anything is removed."""
        return min(node.free_bytes, int(self._high * node.capacity_bytes) - node.staying_bytes)

    def for_replicas(self, reader: Node) -> list[Node]:
        """Where more copies may go, best first: to the reader's own node, then by room."""
        return sorted(self._takers(), key=lambda node: (node is not reader, -self.room_for_replicas(node)))

    def room_for_replicas(self, node: Node) -> int:
        """Bytes that nobody needs for anything better."""
        return min(node.free_bytes, int(self._low * node.capacity_bytes) - node.staying_bytes)

    def takes(self, node: Node) -> bool:
        """Whether the node gets new pages."""
        return node.reachable and not node.segment.is_disk and not node.is_draining

    def _takers(self) -> list[Node]:
        return [node for node in self._nodes if self.takes(node)]
