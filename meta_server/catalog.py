"""Pages and segments together: the one place where the index, the segments' room and the journal change in step.

A page that leaves the index is first taken out durably, then ordered free (`NodeOrders.free`) once nobody holds a lease on
it, again and again until the daemon reports it freed. Called by `puts`, `reclaim` and the server's dispatch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meta_server.copies import Heirs
from meta_server.counts import PoolCounts
from meta_server.events import EventLog
from meta_server.index import BlockIndex
from meta_server.journal import Journal
from meta_server.leases import LeaseTable
from meta_server.nodes import Node, NodeTable
from meta_server.owners import NOBODY
from meta_server.page_arrays import ExtentArray, Removed
from meta_server.records import (
    EXTENT_BYTES,
    CommittedRun,
    OpenRemoval,
    Removal,
    extent_list,
    pack_extents,
    pack_sizes,
    unpack_extents,
    unpack_sizes,
)
from meta_server.slots import SlotArray
from stratakv.keys import KEY_BYTES
from stratakv.wire import Extent, Segment
from stratakv.wire_events import EventKind


@dataclass(frozen=True, slots=True)
class _HeldBack:
    """A page that left the index while readers held a lease on it."""

    segment: int
    removal_id: int
    extent: Extent
    page_bytes: int


class Catalog:
    """Every committed page, on every segment."""

    def __init__(
        self,
        index: BlockIndex,
        nodes: NodeTable,
        journal: Journal,
        pins: LeaseTable,
        events: EventLog,
        last_removal_id: int = 0,
        places_max: int = 1,
    ) -> None:
        """`pins` stay with their pages when these move; read leases stay with their places. `places_max`: of one block."""
        self.index = index
        self._pins = pins
        self.nodes = nodes
        self.counts = PoolCounts()
        self._journal = journal
        self._events = events
        self._last_removal_id = last_removal_id
        self._places_max = places_max
        self._unfreed: Counter[int] = Counter()
        """Removal → pages the daemon has not freed."""
        self._held_back: dict[int, _HeldBack] = {}

    def add_segment(self, segment: Segment, *, quiet_s: float = 0.0) -> Node:
        """A daemon's new epoch; the caller has voided the one before."""
        node = self.nodes.add(segment, quiet_s=quiet_s)
        self.index.set_available(node.index, False)
        return node

    def set_reachable(self, node: Node, reachable: bool) -> None:
        """Whether the node's pages may be found."""
        if node.reachable != reachable:
            self._events.node(EventKind.NODE_UP if reachable else EventKind.NODE_DOWN, node)
        node.reachable = reachable
        self._succeed(self.index.set_available(node.index, reachable))

    def void_segment(self, node: Node) -> None:
        """The node's epoch is over: its pages are gone, and its memory is no concern of ours any more."""
        self._succeed(self.index.set_available(node.index, False))
        self.counts.removal(node, "void", node.committed_pages, node.committed_bytes)
        self._count_copies(self.index.remove(self.index.in_segment(node.index)))
        for slot in [slot for slot, held in self._held_back.items() if held.segment == node.index]:
            del self._held_back[slot]
        for removal_id, _ in node.freeing.values():
            self._unfreed.pop(removal_id, None)
        self.nodes.retire(node)
        self._events.node(EventKind.NODE_GONE, node)

    def insert(
        self,
        node: Node,
        namespace: bytes,
        keys: bytes,
        extents: ExtentArray,
        page_bytes: int,
        kind: EventKind = EventKind.BLOCKS_ADDED,
        *,
        owner: int = NOBODY,
    ) -> None:
        """Make committed pages visible; `kind` is what followers are told.

        Where a key is there already, the older page stays if it can be reached and gives way if not.
        """
        self.remove(self.index.unreachable(namespace, keys), "replaced")
        surplus = self.index.insert(namespace, keys, node.index, extents, page_bytes, owner)
        node.committed_bytes += (len(extents) - len(surplus)) * page_bytes
        node.committed_pages += len(extents) - len(surplus)
        if len(surplus):
            self._take_out_surplus(node, surplus, page_bytes)
            # Those that were there already stay where they are.
            keys = self.index.packed_keys(np.unique(self.index.lying_in(namespace, keys, node.index)[1]))
        self._events.blocks(kind, node, namespace, keys)

    def relocate(
        self,
        source: Node,
        target: Node,
        namespace: bytes,
        keys: bytes,
        extents: ExtentArray,
        page_bytes: int,
        owner: int = NOBODY,
    ) -> None:
        """Copies on `target` take the places of the pages on `source`.

        What has left `source` meanwhile (flushed, found corrupt) stays out, and so does what lies elsewhere already; unless all of
        `source` is gone.
        """
        if self.nodes.at(source.index) is not source:
            self.insert(target, namespace, keys, extents, page_bytes, owner=owner)
            return
        there, old = self.index.lying_in(namespace, keys, source.index)
        are_several = self.index.copies.are_several(old)
        self.remove(old[are_several], "moved")
        there, old = there[~are_several], old[~are_several]
        moved = b"".join(keys[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in there.tolist())
        history = self.index.history(old)
        self.remove(old, "moved", is_told=False)
        self.insert(target, namespace, moved, extents[there], page_bytes, EventKind.BLOCKS_MOVED, owner=owner)
        self.index.set_history(namespace, moved, history)
        self._take_out_surplus(target, np.delete(extents, there, axis=0), page_bytes)
        self.moved(old, self.index.lying_in(namespace, moved, target.index)[1])

    def replicate(
        self,
        source: Node,
        target: Node,
        namespace: bytes,
        keys: bytes,
        extents: ExtentArray,
        page_bytes: int,
        owner: int = NOBODY,
    ) -> None:
        """Copies on `target` are further places of the blocks on `source`; what has left that meanwhile stays out, as above."""
        if self.nodes.at(source.index) is not source:
            self.insert(target, namespace, keys, extents, page_bytes, owner=owner)
            return
        there, first = self.index.lying_in(namespace, keys, source.index)
        if not source.reachable:
            there, first = there[:0], first[:0]
        taken = there[self._add_copies(target, first, extents[there], page_bytes, owner)]
        self.counts.replicas_made += len(taken)
        self._take_out_surplus(target, np.delete(extents, taken, axis=0), page_bytes)

    def drop_spare(self, node: Node, size_bytes: int, namespace: bytes = b"") -> int:
        """Give up pages whose blocks lie elsewhere too, coldest first, to free `size_bytes`; how many bytes that are."""
        slots = self.index.spare(node.index, size_bytes, namespace)
        size_freed = int(self.index.extents(slots)[1].sum())
        if len(slots):
            self.remove(slots, "spare")
        return size_freed

    def moved(self, old: SlotArray, new: SlotArray) -> None:
        """Pages have moved from some slots to others."""
        pinned = self.index.are_pinned(old)
        if pinned.any():
            self.unpinned(self._pins.follow(old[pinned], new[pinned]))

    def remove(self, slots: SlotArray, reason: str, *, is_told: bool = True) -> int:
        """Take pages out of the index, and see to it that they are freed; how many.

        Followers are told of blocks that lie nowhere any more, unless `is_told` is False: the same are inserted elsewhere next.
        """
        for namespace, segment, mine in self.index.by_place(self.index.copies.last_of(slots)) if is_told else ():
            keys = self.index.packed_keys(mine)
            self._events.blocks(EventKind.BLOCKS_REMOVED, self._node(segment), namespace, keys)
        removed = self.index.remove(slots)
        for segment in np.unique(removed.segments).tolist():
            node, mine = self._node(segment), removed.segments == segment
            extents, sizes = removed.extents[mine], removed.page_bytes[mine]
            node.committed_bytes -= int(sizes.sum())
            node.committed_pages -= len(sizes)
            self.counts.removal(node, reason, len(sizes), int(sizes.sum()))
            pinned_slots = removed.slots[mine & removed.pinned].tolist()
            pinned_at = np.flatnonzero(removed.pinned[mine]).tolist()
            self._take_out(node, extents, sizes, reason, dict(zip(pinned_at, pinned_slots, strict=True)))
        self._count_copies(removed)
        return len(removed)

    def unpinned(self, slots: Iterable[SlotArray]) -> None:
        """Nobody reads these pages any more that had left the index before."""
        for slot in (int(slot) for array in slots for slot in array):
            held = self._held_back.pop(slot, None)
            node = self.nodes.at(held.segment) if held is not None else None
            if held is not None and node is not None:
                node.order_free(held.removal_id, [held.extent], [held.page_bytes])

    def leaving(self, node: Node) -> set[Extent]:
        """Places of pages that have left the index and that the daemon must keep until it is told otherwise."""
        held = (held.extent for held in self._held_back.values() if held.segment == node.index)
        return {*node.freeing, *held}

    def freed(self, node: Node, extents: Iterable[Extent]) -> None:
        """The daemon reports that it has these back."""
        for removal_id in node.freed(extents):
            self._count_freed(removal_id)

    def restore(self, runs: Iterable[CommittedRun], removals: Iterable[OpenRemoval], nodes: dict[bytes, Node]) -> None:
        """Fill the index from the snapshot: `runs` oldest first, without the removed pages."""
        gone: dict[bytes, set[bytes]] = {}
        for removal in removals:
            gone.setdefault(removal.epoch, set()).update(_records(removal.extents))
            if not removal.freed:
                self._resume(nodes[removal.epoch], removal)
        for run in runs:
            keys, extents = run.keys, unpack_extents(run.extents)
            if removed := gone.get(run.epoch):
                kept = [i for i, record in enumerate(_records(run.extents)) if record not in removed]
                keys = b"".join(keys[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in kept)
                extents = extents[kept]
            if keys:
                self._restore_run(nodes[run.epoch], run.namespace, keys, extents, run.page_bytes, run.owner)

    def _restore_run(
        self, node: Node, namespace: bytes, keys: bytes, extents: ExtentArray, page_bytes: int, owner: int
    ) -> None:
        """Pages whose blocks lie in memory elsewhere are further places of them, as far as there may be any; others are new."""
        is_new = np.ones(len(extents), np.bool_)
        if self._places_max > 1:
            there, first = self.index.present(namespace, keys)
            is_new[there[self._add_copies(node, first, extents[there], page_bytes, owner)]] = False
        rest = b"".join(keys[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in np.flatnonzero(is_new).tolist())
        if rest:
            self.insert(node, namespace, rest, extents[is_new], page_bytes, owner=owner)

    def _add_copies(
        self, node: Node, first: SlotArray, extents: ExtentArray, page_bytes: int, owner: int
    ) -> NDArray[np.bool_]:
        """Which of them were taken. Only memory is copied, and only to memory."""
        index = self.index
        taken = np.array([not self._node(at).segment.is_disk for at in index.segments(first).tolist()], np.bool_)
        taken &= not node.segment.is_disk
        taken[taken] = index.add_copies(first[taken], node.index, extents[taken], page_bytes, self._places_max, owner)
        node.committed_bytes += int(taken.sum()) * page_bytes
        node.committed_pages += int(taken.sum())
        return taken

    def _count_copies(self, removed: Removed) -> None:
        self.counts.replicas_removed += removed.num_copies
        self.counts.replicas_promoted += len(removed.heirs)
        self._succeed(removed.heirs)

    def _succeed(self, heirs: Heirs) -> None:
        """Blocks are looked for at other places of theirs now."""
        if len(heirs):
            for namespace, segment, mine in self.index.by_place(heirs.new):
                keys = self.index.packed_keys(mine)
                self._events.blocks(EventKind.BLOCKS_MOVED, self._node(segment), namespace, keys)
            self.moved(heirs.old, heirs.new)

    def _node(self, segment: int) -> Node:
        node = self.nodes.at(segment)
        assert node is not None, "the index holds pages of a segment that is no more"
        return node

    def _resume(self, node: Node, removal: OpenRemoval) -> None:
        extents, sizes = extent_list(unpack_extents(removal.extents)), unpack_sizes(removal.page_bytes)
        self._unfreed[removal.id] = len(extents)
        node.freeing_bytes += int(sizes.sum())
        node.order_free(removal.id, extents, sizes.tolist())

    def _take_out_surplus(self, node: Node, extents: ExtentArray, page_bytes: int) -> None:
        if len(extents):
            self._take_out(node, extents, np.full(len(extents), page_bytes, np.int64), "surplus", pinned={})

    def _take_out(
        self, node: Node, extents: ExtentArray, sizes: NDArray[np.int64], reason: str, pinned: dict[int, int]
    ) -> None:
        """`pinned`: position → slot of those that readers hold a lease on."""
        self._last_removal_id += 1
        removal_id = self._last_removal_id
        self._unfreed[removal_id] = len(extents)
        node.freeing_bytes += int(sizes.sum())
        pages = list(zip(extent_list(extents), sizes.tolist(), strict=True))
        for position, slot in pinned.items():
            extent, size = pages[position]
            self._held_back[slot] = _HeldBack(node.index, removal_id, extent, size)
        free = [page for position, page in enumerate(pages) if position not in pinned]
        removal = Removal(removal_id, node.segment.epoch, pack_extents(extents), pack_sizes(sizes), reason)
        self._journal.remove(
            removal, lambda: node.order_free(removal_id, [page[0] for page in free], [page[1] for page in free])
        )

    def _count_freed(self, removal_id: int) -> None:
        self._unfreed[removal_id] -= 1
        if self._unfreed[removal_id] <= 0:
            del self._unfreed[removal_id]
            self._journal.finish_removal(removal_id)


def _records(packed: bytes) -> list[bytes]:
    return [packed[i : i + EXTENT_BYTES] for i in range(0, len(packed), EXTENT_BYTES)]
