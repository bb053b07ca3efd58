"""A pool in one thread for tests of the meta server: its real handlers, daemons played by objects, a clock to turn.

PostgreSQL is played by `MemoryStore`, which keeps to the conditional updates of `queries.sql` and can fail before or after it
has written; the same promises are checked against the real one in tests/integration/meta_server.
"""

from __future__ import annotations

import asyncio
import enum
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from meta_server.handlers import Handlers
from meta_server.records import CommittedRun, OpenRemoval, Snapshot, StartedPut, WriteBatch
from stratakv import wire
from stratakv.errors import Unavailable
from stratakv.pool.meta_errors import StaleEpoch
from stratakv.settings import MetaSettings

PAGE_BYTES = 4096
NAMESPACE = b"n" * 16
ReplyT = TypeVar("ReplyT", bound=wire.Message)


class Fault(enum.Enum):
    """How the next write fails."""

    NONE = enum.auto()
    BEFORE = enum.auto()
    AFTER = enum.auto()
    """Written, but the answer is lost."""


@dataclass
class _Row:
    put: StartedPut
    state: str = "pending"
    extents: bytes = b""


class MemoryStore:
    """What PostgreSQL would hold."""

    def __init__(self) -> None:
        self.fault = Fault.NONE
        self.segments: dict[bytes, wire.Segment] = {}
        self.dead: list[bytes] = []
        self.puts: OrderedDict[bytes, _Row] = OrderedDict()
        self.removals: dict[int, OpenRemoval] = {}
        self.rules: dict[bytes, wire.CacheRule] = {}

    async def write(self, batch: WriteBatch) -> dict[bytes, str]:
        fault, self.fault = self.fault, Fault.NONE
        if fault is Fault.BEFORE:
            raise Unavailable("database is away")
        for segment in batch.segments:
            self._register(segment)
        for put in batch.starts:
            self.puts.setdefault(put.put_id, _Row(put))
        for put_id in batch.voids:
            if put_id in self.puts and self.puts[put_id].state == "pending":
                self.puts[put_id].state = "void"
        for put_id, extents in batch.ends:
            row = self.puts.get(put_id)
            if row is not None and row.state == "pending":
                row.state, row.extents = "committed", extents
        for m in batch.removals:
            self.removals.setdefault(m.id, OpenRemoval(m.id, m.epoch, m.extents, m.page_bytes, freed=False))
        for put_id, run in batch.pages:
            put = StartedPut(put_id, run.namespace, run.epoch, "", run.page_bytes, 16, run.keys, 0.0, run.owner)
            self.puts.setdefault(put_id, _Row(put, "committed", run.extents))
        for rule in batch.rules:
            self.rules[rule.namespace] = rule
        for removal_id in batch.freed:
            self.removals[removal_id] = replace(self.removals[removal_id], freed=True)
        if fault is Fault.AFTER:
            raise Unavailable("the answer was lost")
        return await self.put_states([*batch.voids, *(end[0] for end in batch.ends)])

    async def put_states(self, put_ids: Iterable[bytes]) -> dict[bytes, str]:
        return {put_id: self.puts[put_id].state for put_id in put_ids if put_id in self.puts}

    def load(self) -> Snapshot:
        live = [row for row in self.puts.values() if row.put.epoch in self.segments]
        return Snapshot(
            segments=list(self.segments.values()),
            dead_epochs=list(self.dead),
            runs=[
                CommittedRun(r.put.namespace, r.put.epoch, r.put.page_bytes, r.put.keys, r.extents, r.put.owner)
                for r in live
                if r.state == "committed"
            ],
            pending=[row.put for row in live if row.state == "pending"],
            decided={put_id: row.state for put_id, row in self.puts.items() if row.state != "pending"},
            removals=[m for m in self.removals.values() if m.epoch in self.segments],
            last_removal_id=max(self.removals, default=0),
            rules=list(self.rules.values()),
        )

    def _register(self, segment: wire.Segment) -> None:
        for epoch, old in list(self.segments.items()):
            if old.node == segment.node and epoch != segment.epoch:
                del self.segments[epoch]
                self.dead.append(epoch)
                for row in self.puts.values():
                    if row.put.epoch == epoch and row.state == "pending":
                        row.state = "void"
        self.segments[segment.epoch] = segment


@dataclass
class Daemon:
    """A daemon's extents: who holds each, by the put that allocated it."""

    segment: wire.Segment
    held: dict[wire.Extent, bytes] = field(default_factory=dict)
    undecided: set[bytes] = field(default_factory=set)
    freed: list[wire.Extent] = field(default_factory=list)
    allocations: int = 0
    keys: dict[wire.Extent, bytes] = field(default_factory=dict)
    """What the headers of its pages say."""
    moves: list[wire.Move] = field(default_factory=list)
    """Ordered, and not carried out yet."""
    moves_away: list[wire.Move] = field(default_factory=list)
    """The same, to other daemons."""
    limit_bytes: int = 0
    owners: dict[wire.Extent, int] = field(default_factory=dict)
    """Who wrote its pages; known to tests only."""
    report: wire.ReportMoves | None = None
    """Carried out, and not answered yet."""

    @property
    def used_bytes(self) -> int:
        return len(self.held) * PAGE_BYTES

    def allocate(self, put_id: bytes, count: int) -> list[wire.Extent]:
        taken = {extent.offset for extent in self.held}
        offsets = [o for o in range(0, self.segment.size_bytes, PAGE_BYTES) if o not in taken][:count]
        assert len(offsets) == count, "the meta server granted room that the daemon has not"
        self.allocations += 1
        extents = [wire.Extent(offset, self.allocations) for offset in offsets]
        self.held.update(dict.fromkeys(extents, put_id))
        self.undecided.add(put_id)
        return extents

    def copy_to(self, other: Daemon) -> None:
        """Carry out the orders to move pages."""
        found = [move for move in self.moves if move.extent in self.held]
        failed = [move.extent for move in self.moves if move.extent not in self.held]
        targets = other.allocate(b"", len(found))
        other.undecided.discard(b"")
        pages = []
        for move, target in zip(found, targets, strict=True):
            other.keys[target] = self.keys[move.extent]
            other.owners[target] = self.owners.get(move.extent, 0)
            pages.append(wire.MovedPage(NAMESPACE, self.keys[move.extent], move.extent, target, move.page_bytes))
        ours, theirs = self.segment, other.segment
        self.report = wire.ReportMoves(ours.node, ours.epoch, theirs.node, theirs.epoch, pages, failed)
        self.moves = []

    def obey(self, orders: wire.NodeOrders) -> None:
        for put_id in orders.committed_puts:
            self.undecided.discard(put_id)
        for put_id in orders.void_puts:
            self.undecided.discard(put_id)
            for extent in [e for e, owner in self.held.items() if owner == put_id]:
                del self.held[extent]
        for extent in orders.free:
            self.held.pop(extent, None)
        self.moves += orders.moves
        self.moves_away += orders.moves_away
        self.limit_bytes = orders.limit_bytes
        self.freed = list(orders.free)


class World:
    """The handlers, their store, the daemons, and time."""

    def __init__(self, **settings: object) -> None:
        self.settings = MetaSettings(**settings)  # type: ignore[arg-type]
        self.store = MemoryStore()
        self.now = 1000.0
        self.loop = asyncio.new_event_loop()
        self.daemons: dict[str, Daemon] = {}
        self._epochs = 0
        self.restart()

    def close(self) -> None:
        self.loop.close()

    def restart(self) -> None:
        """kill -9 and start again: only what is in the store is left."""
        self.run(self._start())

    async def _start(self) -> None:
        # The handlers ask of the store only what MemoryStore has.
        store = self.store
        self.handlers = Handlers(store, store.load(), self.settings, lambda: self.now)  # type: ignore[arg-type]

    def run(self, coroutine: object) -> object:
        return self.loop.run_until_complete(coroutine)  # type: ignore[arg-type]

    def call(self, request: wire.Message, reply_type: type[ReplyT]) -> ReplyT:
        """Handle one request; the journal writes (or fails) once meanwhile."""

        async def handle() -> wire.Message:
            answer = self.handlers.by_message[type(request)](request)
            if isinstance(answer, wire.Message):
                await self.handlers.journal.write_next()
                return answer
            task = asyncio.ensure_future(answer)
            await asyncio.sleep(0)
            written = await self.handlers.journal.write_next()
            if not written and not task.done():
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    raise Unavailable("no answer while the database is away")
            return await task

        reply = self.run(handle())
        assert isinstance(reply, reply_type), reply
        return reply

    def start_daemon(self, name: str, pages: int) -> Daemon:
        """A new epoch of a daemon, registered."""
        self._epochs += 1
        segment = wire.Segment(name, self._epochs.to_bytes(16, "big"), "127.0.0.1", 1, name, pages * PAGE_BYTES)
        self.daemons[name] = Daemon(segment)
        self.call(wire.RegisterNode(segment), wire.Registered)
        return self.daemons[name]

    def start_disk(self, name: str, pages: int) -> Daemon:
        """The disk of a daemon, for the first time."""
        memory = self.daemons[name].segment
        segment = wire.Segment(f"{name}/disk", b"disk" + memory.epoch[4:], "127.0.0.1", 1, "", pages * PAGE_BYTES, name)
        self.daemons[segment.node] = Daemon(segment)
        self.register_disk(self.daemons[segment.node])
        return self.daemons[segment.node]

    def register_disk(self, disk: Daemon) -> None:
        """As a daemon does at its start, and when the meta server has forgotten it."""
        segment = disk.segment
        self.call(wire.RegisterNode(segment), wire.Registered)
        found = wire.ReconcilePages(segment.node, segment.epoch, list(disk.held), is_first=True, is_last=True)
        for extent in self.call(found, wire.Reconciled).unknown:
            del disk.held[extent]

    def report_moves(self, source: Daemon) -> None:
        """Tell what was copied, again until there is an answer."""
        report = source.report
        if report is None:
            return
        try:
            refused = self.call(report, wire.MovesTaken).refused
        except Unavailable:
            return
        except StaleEpoch:
            refused = list(range(len(report.pages)))
        source.report = None
        target = self.daemons[report.target_node]
        for i in refused:
            if target.segment.epoch == report.target_epoch:
                target.held.pop(report.pages[i].target, None)

    def heartbeat(self, daemon: Daemon) -> wire.NodeOrders:
        orders = self.call(
            wire.HeartbeatNode(
                node=daemon.segment.node,
                epoch=daemon.segment.epoch,
                used_bytes=daemon.used_bytes,
                free_bytes=daemon.segment.size_bytes - daemon.used_bytes,
                undecided_puts=sorted(daemon.undecided),
                freed=daemon.freed,
                limit_bytes=daemon.limit_bytes,
            ),
            wire.NodeOrders,
        )
        if not orders.known and daemon.segment.is_disk:
            self.register_disk(daemon)
        else:
            daemon.obey(orders)
        return orders

    def tick(self, seconds: float, *, silent: str = "") -> None:
        """Time passes; daemons report, so that nobody counts as gone but the one that is `silent`."""
        self.now += seconds
        for daemon in self.daemons.values():
            if daemon.segment.node != silent:
                self.heartbeat(daemon)

        async def tick() -> None:
            self.handlers.tick()
            await self.handlers.journal.write_next()
            await asyncio.sleep(0)

        self.run(tick())

    def settle(self) -> None:
        """All deadlines pass and every order is carried out."""
        for _ in range(8):
            self.carry_out_moves()
            self.tick(self.settings.put_timeout_s_max + self.settings.lease_s_max)

    def carry_out_moves(self) -> None:
        """All orders to move pages, and their reports."""
        for daemon in self.daemons.values():
            other = self.daemons.get(daemon.segment.disk_of or f"{daemon.segment.node}/disk")
            if other is None:
                continue
            self.report_moves(daemon)
            room = (other.segment.size_bytes - other.used_bytes) // PAGE_BYTES
            if daemon.report is None and daemon.moves and len(daemon.moves) <= room:
                daemon.copy_to(other)
                self.report_moves(daemon)

    def start_copies(self, source: Daemon, put_id: bytes) -> tuple[list[bytes], wire.PutGrant]:
        """What a daemon does with orders to move pages away, up to where bytes would be written: keys and grant."""
        pages, source.moves_away = source.moves_away, []
        keys = [source.keys[move.extent] for move in pages if move.extent in source.held]
        node = source.segment.node
        request = wire.PutStart(put_id, NAMESPACE, b"".join(keys), PAGE_BYTES, 0, timeout_s=20.0, copies_from=node)
        return keys, self.call(request, wire.PutGrant)

    def drain(self, name: str, *, is_draining: bool = True, is_whole: bool = True) -> wire.DrainProgress:
        return self.call(wire.SetDraining(name, is_draining, is_whole), wire.DrainProgress)

    def stats(self) -> wire.Stats:
        return self.handlers.stats(wire.GetStats())
