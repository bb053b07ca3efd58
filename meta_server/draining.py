"""Daemons that are to be stopped: what is worth keeping of their pages goes to other daemons, hottest first.

The draining daemon copies pages by puts of its own (`PutStart.copies_from`), so that a copy is granted, fenced and found like
any other put, and the page leaves its old place in the same step (`Catalog.relocate`). What no other daemon has room for
goes from its memory to its disk, where the daemon finds it at its next start. Called by the server's dispatch.
"""

from __future__ import annotations

import numpy as np

from meta_server.catalog import Catalog
from meta_server.moves import Moves
from meta_server.nodes import Node
from meta_server.placement import Placement
from meta_server.records import extent_list
from meta_server.slots import SlotArray
from stratakv.errors import InvalidRequest
from stratakv.log import EventLogger
from stratakv.wire import DrainProgress, Move, SetDraining

DRAIN_MOVING_BYTES_MAX = 256 * 1024 * 1024
"""Ordered of one segment at a time."""
FAILURES_MAX = 10
"""A page that could not be copied so often stays."""
_log = EventLogger("meta_server.draining")


class Draining:
    """Orders to draining daemons, and how far they are."""

    def __init__(self, catalog: Catalog, moves: Moves, placement: Placement) -> None:
        self._catalog = catalog
        self._moves = moves
        self._placement = placement

    def set(self, request: SetDraining) -> DrainProgress:
        """Begin, go on or end. Raises InvalidRequest."""
        nodes = self._segments(request.node)
        for node in nodes:
            if node.is_draining != request.is_draining:
                _log.info("draining", node=node.segment.node, is_draining=request.is_draining)
                node.is_draining, node.moved_away = request.is_draining, 0
                node.move_failures.clear()
            node.drains_whole = request.is_whole
        left = [self._left(node) for node in nodes]
        return DrainProgress(
            is_done=all(self._is_done(node, slots) for node, slots in zip(nodes, left, strict=True)),
            pages_moved=sum(node.moved_away for node in nodes),
            pages_left=sum(map(len, left)),
            bytes_left=sum(int(self._catalog.index.extents(slots)[1].sum()) for slots in left),
        )

    def orders(self, node: Node) -> list[Move]:
        """What the node's daemon shall copy to other daemons now; what only its disk has room for is ordered with its moves."""
        if not node.is_draining:
            return []
        staying = [n.index for n in self._catalog.nodes if n.reachable and not n.is_draining]
        self._catalog.remove(self._catalog.index.copies.redundant(node.index, staying), "spare")
        slots = self._left(node)
        if not len(slots):
            return []
        page_bytes = int(self._catalog.index.extents(slots[:1])[1][0])
        in_flight = sum(n.moving_bytes for n in self._catalog.nodes if n.is_draining)
        targets = [self._placement.room_for_copies(n) for n in self._placement.copy_targets(node)]
        if max(targets, default=0) >= page_bytes:
            room = sum(room for room in targets if room > 0) - in_flight
            return self._moves.order(node, slots, room, DRAIN_MOVING_BYTES_MAX)
        disk = self._disk_of(node)
        if disk is not None:
            node.moves_waiting += self._moves.order(node, slots, disk.free_bytes - in_flight, DRAIN_MOVING_BYTES_MAX)
        return []

    def _segments(self, name: str) -> list[Node]:
        memory = self._catalog.nodes.get(name)
        if memory is None or not memory.reachable or memory.segment.is_disk:
            raise InvalidRequest(f"no daemon {name!r} is in the pool and alive", param="node")
        return [memory, *(n for n in self._catalog.nodes if n.segment.disk_of == name and n.reachable)]

    def _left(self, node: Node) -> SlotArray:
        """Pages that are to move, hottest first."""
        index = self._catalog.index
        slots = index.in_segment(node.index) if node.drains_whole else index.worth_keeping(node.index)
        slots = index.copies.without_further(slots)
        if node.move_failures and len(slots):
            extents = extent_list(index.extents(slots)[0])
            slots = slots[np.array([node.move_failures[extent] < FAILURES_MAX for extent in extents], np.bool_)]
        return index.hottest_first(slots)

    def _is_done(self, node: Node, left: SlotArray) -> bool:
        if node.pending_bytes or node.moving:
            return False
        if not len(left):
            return True
        page_bytes = int(self._catalog.index.extents(left[:1])[1][0])
        targets = self._placement.copy_targets(node)
        # A target whose own pages are on their way to its disk will have room.
        if any(target.moving or self._placement.room_for_copies(target) >= page_bytes for target in targets):
            return False
        disk = self._disk_of(node)
        return disk is None or disk.free_bytes < page_bytes

    def _disk_of(self, node: Node) -> Node | None:
        """Where the daemon can put its own pages."""
        disks = (n for n in self._catalog.nodes if n.segment.disk_of == node.segment.node)
        return next((disk for disk in disks if disk.reachable and not disk.read_only), None)
