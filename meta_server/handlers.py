"""What each request does: one method per message, on the catalog, the puts, the leases and the workers. No sockets here.

A handler returns its reply, or an awaitable of it where PostgreSQL is asked or must have written first.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from meta_server.administration import PIN_S_MAX, Administration
from meta_server.ages import Ages
from meta_server.catalog import Catalog
from meta_server.counts import PoolCounts, tier_of
from meta_server.draining import Draining
from meta_server.events import EventLog, Snapshots
from meta_server.index import BlockIndex
from meta_server.journal import Journal, confirmed
from meta_server.leases import LeaseTable
from meta_server.moves import Moves
from meta_server.nodes import Node, NodeTable
from meta_server.own_blocks import OwnBlocks
from meta_server.owner_limits import OwnerLimits
from meta_server.owner_reclaim import OwnerReclaimer
from meta_server.placement import Placement
from meta_server.policies import make_policy
from meta_server.presence import Clock
from meta_server.puts import PutTable
from meta_server.reclaim import Reclaimer
from meta_server.records import Snapshot
from meta_server.replicas import Replicas
from meta_server.rules import Rules
from meta_server.store import QUERIES, Store
from meta_server.validate import (
    INT64_MAX,
    check_keys,
    check_moves,
    check_protocol,
    check_put,
    check_put_id,
    check_range,
    check_segment,
    check_worker,
)
from meta_server.workers import WorkerTable
from stratakv import wire
from stratakv.errors import InvalidRequest
from stratakv.keys import KEY_BYTES
from stratakv.pool.meta_errors import StaleEpoch
from stratakv.settings import MetaSettings
from stratakv.version import version

Answer = wire.Message | Awaitable[wire.Message]
UNDECIDED_MAX = 4096
"""Puts looked up for one heartbeat; the daemon asks for the others again."""


class Handlers:
    """The meta server's state and what requests do to it."""

    def __init__(self, store: Store, snapshot: Snapshot, settings: MetaSettings, clock: Clock) -> None:
        self._settings = settings
        self._store = store
        self.journal = Journal(store)
        self._nodes = NodeTable(clock, settings.heartbeat_s, snapshot.dead_epochs)
        self._workers = WorkerTable(clock, settings.heartbeat_s)
        self._index = BlockIndex(make_policy(settings.policy))
        self.own_blocks = OwnBlocks(self._index, self._nodes, self._workers)
        self._leases = LeaseTable(self._index, clock, leases_max=settings.leases_max, lease_s_max=settings.lease_s_max)
        self._pins = LeaseTable(self._index, clock, leases_max=settings.pins_max, lease_s_max=PIN_S_MAX)
        self._epoch = secrets.token_bytes(wire.EPOCH_BYTES)
        self.events_port = 0
        """Where events are published."""
        self.events = EventLog(self._epoch, clock)
        self.snapshots = Snapshots(self.events, self._index, self._nodes)
        self._catalog = Catalog(
            self._index,
            self._nodes,
            self.journal,
            self._pins,
            self.events,
            snapshot.last_removal_id,
            settings.replicas_max,
        )
        ages = Ages(clock)
        self._rules = Rules(self._catalog, self.journal, clock, ages, snapshot.rules)
        self._reclaimer = Reclaimer(self._catalog, clock, ages, high=settings.reclaim_high, low=settings.reclaim_low)
        limits = OwnerLimits(self._index)
        self._moves = Moves(self._catalog, self.journal, clock, settings, limits)
        self.owners = OwnerReclaimer(self._catalog, self._moves, limits, clock, settings)
        placement = Placement(
            self._nodes,
            self._reclaimer.make_room,
            high=settings.reclaim_high,
            low=min(settings.reclaim_low, settings.demote_low),
        )
        self._replicas = Replicas(self._catalog, placement, clock, settings, limits)
        self._puts = PutTable(self._catalog, self.journal, store, clock, settings, placement, self._replicas)
        self._draining = Draining(self._catalog, self._moves, placement)
        self.administration = Administration(self._catalog, self.journal, self._workers, self._pins, self._rules)
        self.term = 0
        """In which this server leads."""
        self._lookups = self._lookup_hits = 0
        self._restore(snapshot)
        self.events.is_quiet = False
        self.by_message: dict[type[wire.Message], Callable[[Any], Answer]] = {
            wire.Hello: self.hello,
            wire.RegisterNode: self.register_node,
            wire.HeartbeatNode: self.heartbeat_node,
            wire.ReportMoves: self.report_moves,
            wire.ReconcilePages: self.reconcile_pages,
            wire.RegisterWorker: self.register_worker,
            wire.HeartbeatWorker: self.heartbeat_worker,
            wire.ListWorkers: lambda _: wire.Workers(self._workers.states()),
            wire.ListNodes: lambda _: wire.Nodes(self._nodes.states()),
            wire.MatchPrefix: self.match_prefix,
            wire.FetchAhead: self.fetch_ahead,
            wire.FindBlocks: self.find_blocks,
            wire.ReleaseLease: self.release_lease,
            wire.GetEventSnapshot: self.event_snapshot,
            wire.PutStart: self.put_start,
            wire.PutEnd: self.put_end,
            wire.PutRevoke: self.put_revoke,
            wire.ReportCorrupt: self.report_corrupt,
            **self.administration.by_message,
            wire.SetDraining: self._draining.set,
            wire.SetOwnerLimits: self.owners.set_limits,
            wire.ListOwners: self.owners.states,
            wire.GetStats: self.stats,
        }

    @property
    def nodes(self) -> NodeTable:
        return self._nodes

    @property
    def counts(self) -> PoolCounts:
        return self._catalog.counts

    def tick(self) -> None:
        """Time has passed: leases and puts end, the silent are gone, full segments are reclaimed."""
        self._catalog.unpinned(self._leases.expire())
        self._catalog.unpinned(self._pins.expire())
        self._rules.apply()
        self.owners.apply()
        self._puts.expire()
        for node in list(self._nodes):
            if node.reachable and not node.pulse.alive:
                self._catalog.set_reachable(node, False)
            if not node.segment.is_disk and node.pulse.silent_s > self._settings.node_silence_s_max:
                self._forget_node(node)
                continue
            if node.limit_bytes:
                self._moves.demote(node)
            self._reclaimer.check(node)
        self.events.tick()

    def _forget_node(self, node: Node) -> None:
        """Its daemon does not come back: what was in its memory is lost, and must not be known for ever."""
        self._puts.void_node(node)
        self._catalog.void_segment(node)
        self.journal.execute(QUERIES["end_older_segments"], node.segment.node, b"")

    def hello(self, request: wire.Hello) -> wire.Welcome:
        check_protocol(request)
        return wire.Welcome(wire.PROTOCOL_VERSION, version(), self._epoch, term=self.term, events_port=self.events_port)

    def register_node(self, request: wire.RegisterNode) -> Answer:
        segment = request.segment
        check_segment(segment)
        self._nodes.check_epoch(segment)
        node = self._nodes.get(segment.node)
        if node is not None and node.segment.epoch != segment.epoch:
            self._puts.void_node(node)
            self._catalog.void_segment(node)
            node = None
        if node is not None and segment.size_bytes != node.segment.size_bytes:
            raise InvalidRequest("a segment's size cannot change within an epoch", param="size_bytes")
        if node is None:
            node = self._catalog.add_segment(segment)
        node.segment = segment
        if segment.is_disk:
            node.is_reconciled = False
            self._catalog.set_reachable(node, False)
        return self._written(self.journal.register_segment(segment), lambda: self._announce(segment))

    def heartbeat_node(self, request: wire.HeartbeatNode) -> Answer:
        node = self._nodes.of_epoch(request.node, request.epoch)
        if node is None or not node.is_reconciled:
            return wire.NodeOrders(known=False)
        self._beat(node)
        node.read_only = request.read_only
        if node.limit_bytes is None:
            node.limit_bytes = request.limit_bytes
        self._catalog.freed(node, request.freed)
        node.report_used(request.used_bytes)
        if request.undecided_puts:
            return self._decide(node, request.undecided_puts[:UNDECIDED_MAX])
        return self._orders(node)

    async def report_moves(self, request: wire.ReportMoves) -> wire.MovesTaken:
        check_moves(request)
        return await self._moves.report(request)

    def reconcile_pages(self, request: wire.ReconcilePages) -> wire.Reconciled:
        return self._moves.reconcile(request)

    def register_worker(self, request: wire.RegisterWorker) -> wire.Registered:
        check_worker(request.info)
        self._workers.register(request.info)
        self.journal.register_worker(request.info)
        return wire.Registered(heartbeat_s=self._settings.heartbeat_s)

    def heartbeat_worker(self, request: wire.HeartbeatWorker) -> wire.WorkerOrders:
        return wire.WorkerOrders(known=self._workers.heartbeat(request))

    def fetch_ahead(self, request: wire.FetchAhead) -> wire.Done:
        check_keys(request.namespace, request.keys)
        self._moves.fetch(self._index.match(request.namespace, request.keys))
        return wire.Done()

    def match_prefix(self, request: wire.MatchPrefix) -> wire.Match:
        check_keys(request.namespace, request.keys)
        slots = self._index.match(request.namespace, request.keys)
        self._lookups += 1
        self._lookup_hits += len(slots) > 0
        self._catalog.counts.asked += len(request.keys) // KEY_BYTES if request.lease_s else 0
        if not len(slots) or request.lease_s == 0:
            return wire.Match(num_blocks=len(slots))
        read_at = self._replicas.read_at(slots, request.node)
        lease_id = self._leases.grant(read_at, request.lease_s)
        self._index.touch(slots, read_at)
        self._moves.read(slots)
        self._replicas.count(slots, read_at, request.node)
        indexes, segment_of, extents = self._index.packed_places(read_at)
        self._count_found(indexes, segment_of)
        segments = [self._segment_of(index) for index in indexes]
        return wire.Match(len(slots), segments, segment_of, extents, lease_id)

    def find_blocks(self, request: wire.FindBlocks) -> wire.FoundBlocks:
        check_keys(request.namespace, request.keys)
        return wire.FoundBlocks(missing=self._index.absent(request.namespace, request.keys))

    def release_lease(self, request: wire.ReleaseLease) -> wire.Done:
        self._catalog.unpinned(self._leases.release(request.lease_id))
        return wire.Done()

    def event_snapshot(self, request: wire.GetEventSnapshot) -> wire.EventSnapshot:
        check_range("after", request.after, 0, INT64_MAX)
        return self.snapshots.part(request.after)

    def put_start(self, request: wire.PutStart) -> wire.PutGrant:
        check_put(request)
        grant = self._puts.start(request)
        return msgspec.structs.replace(grant, term=self.term) if grant.segment is not None else grant

    async def put_end(self, request: wire.PutEnd) -> wire.Done:
        check_put_id(request.put_id)
        await self._puts.end(request)
        return wire.Done()

    async def put_revoke(self, request: wire.PutRevoke) -> wire.Done:
        check_put_id(request.put_id)
        await self._puts.revoke(request.put_id)
        return wire.Done()

    def report_corrupt(self, request: wire.ReportCorrupt) -> wire.Done:
        """Out of the index at once; durably soon (a restart in between only brings the page back to be found corrupt)."""
        check_keys(request.namespace, request.key)
        node = self._nodes.get(request.place.node)
        if node is not None and len(request.key) == KEY_BYTES:
            place = request.place
            slots = self._index.at(request.namespace, request.key, node.index, place.offset, place.generation)
            self._catalog.remove(slots, "corrupt")
        return wire.Done()

    def stats(self, _: wire.GetStats) -> wire.Stats:
        return wire.Stats(
            blocks=self._index.num_blocks,
            bytes_committed=self._index.bytes_committed,
            puts_pending=len(self._puts),
            leases=len(self._leases),
            nodes=len(self._nodes.states()),
            workers=len(self._workers.states()),
            lookups=self._lookups,
            lookup_hits=self._lookup_hits,
            evictions=self._reclaimer.evictions,
            evicted_age_s=self._reclaimer.evicted_age_s,
            demoted=self._moves.demoted,
            promoted=self._moves.promoted,
            pins=len(self._pins),
            replicas=len(self._index.copies),
            replica_bytes=self._index.copies.size_bytes,
            replicas_made=self.counts.replicas_made,
            replicas_removed=self.counts.replicas_removed,
            replicas_promoted=self.counts.replicas_promoted,
            replica_reads=self.counts.replica_reads,
        )

    def _restore(self, snapshot: Snapshot) -> None:
        """Readers may hold leases of an earlier start, so nothing restored is freed for one longest lease."""
        quiet_s = self._settings.lease_s_max
        nodes = {s.epoch: self._catalog.add_segment(s, quiet_s=quiet_s) for s in snapshot.segments}
        self._catalog.restore(snapshot.runs, snapshot.removals, nodes)
        self._puts.restore(snapshot.pending, nodes, snapshot.decided)

    def _announce(self, segment: wire.Segment) -> wire.Registered:
        node = self._nodes.of_epoch(segment.node, segment.epoch)
        if node is None:
            raise StaleEpoch(f"{segment.node}: a newer start has registered meanwhile")
        if node.is_reconciled:
            self._beat(node)
        return wire.Registered(heartbeat_s=self._settings.heartbeat_s)

    def _count_found(self, indexes: Sequence[int], segment_of: bytes) -> None:
        counts = np.bincount(np.frombuffer(segment_of, np.uint16), minlength=len(indexes))
        for segment, count in zip(indexes, counts.tolist(), strict=True):
            node = self._nodes.at(segment)
            if node is not None:
                self._catalog.counts.found[tier_of(node)] += count

    def _beat(self, node: Node) -> None:
        node.pulse.beat()
        if not node.reachable:
            self._catalog.set_reachable(node, True)

    async def _decide(self, node: Node, put_ids: list[bytes]) -> wire.NodeOrders:
        committed, void = await self._puts.outcomes(put_ids)
        return self._orders(node, committed, void)

    def _orders(self, node: Node, committed: Sequence[bytes] = (), void: Sequence[bytes] = ()) -> wire.NodeOrders:
        return wire.NodeOrders(
            known=True,
            free=self._reclaimer.orders(node),
            moves_away=self._draining.orders(node) or self._replicas.orders(node),
            moves=self._moves.orders(node),
            committed_puts=list(committed),
            void_puts=list(void),
            limit_bytes=node.limit_bytes or 0,
        )

    async def _written(self, written: asyncio.Future[None], reply: Callable[[], wire.Message]) -> wire.Message:
        await confirmed(written)
        return reply()

    def _segment_of(self, index: int) -> wire.Segment:
        node = self._nodes.at(index)
        assert node is not None, "the index holds pages of a segment that is no more"
        return node.segment
