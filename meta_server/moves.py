"""Pages on their way between a daemon's memory and its disk: which ones to move, and what becomes of them.

Above `demote_high` of a memory segment its coldest pages are copied to the daemon's disk, down to `demote_low`; a page that is
read from disk again and again is copied back while there is room. A page is found at its old place until the copy is
reported and durably known; then the old place is given up like any removed page. Called by the server's dispatch.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from meta_server.catalog import Catalog
from meta_server.counts import Tier
from meta_server.journal import Journal
from meta_server.nodes import Node
from meta_server.owner_limits import OwnerLimits
from meta_server.presence import Clock
from meta_server.records import CommittedRun, extent_array, extent_list, pack_extents, unpack_extents
from meta_server.slots import SlotArray
from stratakv.log import EventLogger
from stratakv.pool.meta_errors import StaleEpoch
from stratakv.settings import MetaSettings
from stratakv.wire import PUT_ID_BYTES, Extent, Move, MovedPage, MovesTaken, Reconciled, ReconcilePages, ReportMoves
from stratakv.wire_events import EventKind

MOVING_BYTES_MAX = 64 * 1024 * 1024
"""Ordered of one segment at a time."""
MOVE_TIMEOUT_S = 60.0
"""An order that was not reported by then is forgotten."""
PROMOTE_READS_MIN = 2
"""A page that was read so often since it came to the disk goes back to memory."""
_log = EventLogger("meta_server.moves")


class Moves:
    """Orders to daemons and their reports."""

    def __init__(
        self, catalog: Catalog, journal: Journal, clock: Clock, settings: MetaSettings, limits: OwnerLimits
    ) -> None:
        self._catalog = catalog
        self._limits = limits
        self._journal = journal
        self._clock = clock
        self._high = settings.demote_high
        self._low = settings.demote_low
        self.demoted = 0
        self.promoted = 0

    def orders(self, node: Node) -> list[Move]:
        """What the node's daemon shall copy now."""
        self._forget_late(node)
        self.demote(node)
        moves, node.moves_waiting = node.moves_waiting, []
        return moves

    def order(
        self, node: Node, slots: SlotArray, room_bytes: int, moving_bytes_max: int = MOVING_BYTES_MAX
    ) -> list[Move]:
        """Those of the pages that shall be copied now, as far as `room_bytes` and the limit go."""
        room_bytes = min(room_bytes, moving_bytes_max - node.moving_bytes)
        extents, sizes = self._catalog.index.extents(slots)
        owners = self._catalog.index.owners.of(slots)
        ordered = []
        for extent, size, owner in zip(extent_list(extents), sizes.tolist(), owners.tolist(), strict=True):
            if extent in node.moving:
                continue
            room_bytes -= size
            if room_bytes < 0:
                break
            node.moving[extent] = (self._clock() + MOVE_TIMEOUT_S, size)
            ordered.append(Move(extent, size, owner))
        return ordered

    def read(self, slots: SlotArray) -> None:
        """These pages are being read: those on disk for the second time go back to memory."""
        counts = self._catalog.index.count_read(slots)
        self.fetch(slots[counts >= PROMOTE_READS_MIN])

    def fetch(self, slots: SlotArray) -> None:
        """Those of these pages that lie on disk go back to memory, as far as there is room and the limit goes."""
        if not len(slots) or not any(node.segment.is_disk for node in self._catalog.nodes):
            return
        slots = self._limits.allowed(slots, Tier.MEMORY)
        for segment in np.unique(self._catalog.index.segments(slots)).tolist():
            node = self._catalog.nodes.at(segment)
            memory = (
                self._catalog.nodes.get(node.segment.disk_of) if node is not None and node.segment.is_disk else None
            )
            if node is not None and memory is not None and memory.reachable and not memory.is_draining:
                room = int(self._high * memory.capacity_bytes) - memory.staying_bytes - node.moving_bytes
                node.moves_waiting += self.order(node, slots[self._catalog.index.segments(slots) == segment], room)

    async def report(self, request: ReportMoves) -> MovesTaken:
        """Take the copies for the pages. Raises StaleEpoch, Unavailable."""
        nodes = self._catalog.nodes
        source = nodes.of_epoch(request.source_node, request.source_epoch)
        target = nodes.of_epoch(request.target_node, request.target_epoch)
        if source is None or target is None:
            raise StaleEpoch("one of the two segments is not what it was")
        for extent in (*request.failed, *(page.source for page in request.pages)):
            source.moving.pop(extent, None)
        source.move_failures.update(request.failed if source.is_draining else ())
        by_slot: dict[int, MovedPage] = {}
        for page in request.pages:
            slot = self._slot(source, page.namespace, page.key, page.source)
            # What lies elsewhere too needs no other place.
            if slot is not None and not self._catalog.index.copies.are_several(np.array([slot], np.int64))[0]:
                # Orders of an earlier start of this server may have had it copied twice.
                by_slot.setdefault(slot, page)
        if by_slot:
            await self._take(source, target, by_slot)
        # A report that is repeated finds its pages at their targets.
        there = [self._slot(target, page.namespace, page.key, page.target) for page in request.pages]
        return MovesTaken([i for i, slot in enumerate(there) if slot is None])

    def reconcile(self, request: ReconcilePages) -> Reconciled:
        """What of these a disk still has, and what nobody knows any more. Raises StaleEpoch."""
        node = self._catalog.nodes.of_epoch(request.node, request.epoch)
        if node is None:
            raise StaleEpoch("the disk has not registered")
        if request.is_first:
            node.found = set()
        known = self._catalog.index.exact(node.index, extent_array(request.extents))
        node.found.update(e for e, is_known in zip(request.extents, known, strict=True) if is_known)
        if request.is_last:
            self._drop_lost(node)
        leaving = self._catalog.leaving(node)
        unknown = (e for e, is_known in zip(request.extents, known, strict=True) if not is_known)
        return Reconciled([extent for extent in unknown if extent not in leaving])

    def demote(self, node: Node) -> None:
        """Order the coldest pages to the daemon's disk if the memory is too full."""
        if self.disk_of(node) is None:
            return
        size = node.capacity_bytes
        staying = node.staying_bytes - node.moving_bytes
        if staying > self._high * size:
            staying -= self._catalog.drop_spare(node, staying - int(self._low * size))
            cold = self._catalog.index.coldest(node.index, staying - int(self._low * size) + node.moving_bytes)
            several = self._catalog.index.copies.are_several(cold)
            self._catalog.remove(cold[several], "spare")
            self.send_down(node, cold[~several])

    def disk_of(self, node: Node) -> Node | None:
        """Where the coldest pages of a memory segment can go now."""
        if node.segment.is_disk or node.is_draining:
            return None
        disk = next((n for n in self._catalog.nodes if n.segment.disk_of == node.segment.node), None)
        return None if disk is None or not disk.reachable or disk.read_only else disk

    def send_down(self, node: Node, slots: SlotArray) -> NDArray[np.bool_]:
        """Order pages to the daemon's disk, as far as there is room and the limit goes; which are on their way now."""
        if (disk := self.disk_of(node)) is not None:
            node.moves_waiting += self.order(node, self._limits.allowed(slots, Tier.DISK), disk.free_bytes)
        extents = extent_list(self._catalog.index.extents(slots)[0])
        return np.array([extent in node.moving for extent in extents], np.bool_)

    def _forget_late(self, node: Node) -> None:
        now = self._clock()
        for extent, (until, _) in list(node.moving.items()):
            if until > now:
                break
            del node.moving[extent]

    def _slot(self, node: Node, namespace: bytes, key: bytes, extent: Extent) -> int | None:
        slots = self._catalog.index.at(namespace, key, node.index, extent.offset, extent.generation)
        return int(slots[0]) if len(slots) else None

    async def _take(self, source: Node, target: Node, by_slot: dict[int, MovedPage]) -> None:
        pages, owners = list(by_slot.values()), self._catalog.index.owners.of(np.array(list(by_slot), np.int64))
        runs = list(_runs(target.segment.epoch, pages, owners.tolist()))
        for run in runs:
            self._journal.add_pages(os.urandom(PUT_ID_BYTES), run)
        await self._journal.all_written()
        index = self._catalog.index
        ticks = [index.ticks(run.namespace, run.keys) for run in runs]
        left = [self._slot(source, page.namespace, page.key, page.source) for page in pages]
        old = np.array([slot for slot in left if slot is not None], np.int64)
        old = old[~index.copies.are_several(old)]
        is_there = self._catalog.nodes.at(target.index) is target
        self._catalog.remove(old, "moved", is_told=not is_there)
        if is_there:
            before = target.committed_bytes
            for run, was in zip(runs, ticks, strict=True):
                extents, kind = unpack_extents(run.extents), EventKind.BLOCKS_MOVED
                self._catalog.insert(target, run.namespace, run.keys, extents, run.page_bytes, kind, owner=run.owner)
                index.set_ticks(run.namespace, run.keys, was)
            # Its daemon may have told of their bytes before it told of the pages: counted twice, they would have others removed.
            target.foreign_bytes = max(0, target.foreign_bytes - (target.committed_bytes - before))
            self._keep_pinned(target, pages, left)
        if source.is_draining:
            source.moved_away += len(old)
        if target.segment.is_disk and not source.segment.is_disk:
            self.demoted += len(pages)
        elif source.segment.is_disk and not target.segment.is_disk:
            self.promoted += len(pages)
        _log.debug("pages_moved", source=source.segment.node, target=target.segment.node, pages=len(pages))

    def _keep_pinned(self, target: Node, pages: list[MovedPage], left: list[int | None]) -> None:
        new = [self._slot(target, page.namespace, page.key, page.target) for page in pages]
        moved = [(a, b) for a, b in zip(left, new, strict=True) if a is not None and b is not None]
        if moved:
            self._catalog.moved(*(np.array(slots, np.int64) for slots in zip(*moved, strict=True)))

    def _drop_lost(self, node: Node) -> None:
        slots = self._catalog.index.in_segment(node.index)
        places = extent_list(self._catalog.index.extents(slots)[0])
        lost = [slot for slot, place in zip(slots.tolist(), places, strict=True) if place not in node.found]
        if lost:
            _log.warning("pages_lost_on_disk", node=node.segment.node, pages=len(lost))
            self._catalog.remove(np.array(lost, np.int64), "lost")
        node.found = set()
        node.is_reconciled = True
        node.pulse.beat()
        self._catalog.set_reachable(node, True)


def _runs(epoch: bytes, pages: Iterable[MovedPage], owners: Iterable[int]) -> Iterable[CommittedRun]:
    """The pages as rows of the journal: one for each namespace, size and owner."""
    groups: defaultdict[tuple[bytes, int, int], list[MovedPage]] = defaultdict(list)
    for page, owner in zip(pages, owners, strict=True):
        groups[page.namespace, page.page_bytes, owner].append(page)
    for (namespace, page_bytes, owner), group in groups.items():
        keys, extents = b"".join(page.key for page in group), [page.target for page in group]
        yield CommittedRun(namespace, epoch, page_bytes, keys, pack_extents(extent_array(extents)), owner)
