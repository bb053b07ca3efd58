"""A daemon's tiers against a model of the index: whatever becomes of puts, moves, reports and the disk, bytes in use are those
of pages that the index knows (P4), and each of them is as it was written (P1)."""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dmp.allocator import ExtentAllocator
from dmp.disk import mover as mover_module
from dmp.disk import store as store_module
from dmp.disk.mover import Mover
from dmp.disk.store import DiskStore
from dmp.metrics import DaemonMetrics
from dmp.pages import read_page
from dmp.puts import FREE_GRACE_S, PutTable
from dmp.segment import MemorySegment
from stratakv.errors import Unavailable
from stratakv.keys import BlockKey, Namespace
from stratakv.layout import ALIGNMENT_BYTES, HEADER_BYTES, PageHeader
from stratakv.pool.errors import SegmentFull
from stratakv.pool.meta_errors import StaleEpoch
from stratakv.wire import Extent, Move, MovesTaken, ReportMoves, Segment

NAMESPACE = Namespace(b"n" * 16)
SEGMENT_BYTES = 2 << 20
DISK_BYTES = 60 * ALIGNMENT_BYTES
FILE_BYTES = 12 * ALIGNMENT_BYTES
PUT_TIMEOUT_S = 30.0


class End(enum.Enum):
    """How a put ends."""

    COMMITTED = enum.auto()
    GIVEN_UP = enum.auto()
    LATE = enum.auto()
    COMMITTED_LATE = enum.auto()


class Answer(enum.Enum):
    """What becomes of a report."""

    TAKEN = enum.auto()
    FIRST_LOST = enum.auto()
    HALF_REFUSED = enum.auto()
    REFUSED = enum.auto()
    UNHEARD = enum.auto()
    HEARD_BUT_NOT_ANSWERED = enum.auto()


@dataclass
class Page:
    """As the index has it, and what its writer wrote."""

    place: Extent
    is_on_disk: bool
    data: bytes


@dataclass
class Index:
    """The meta server, as far as the mover sees it."""

    pages: dict[bytes, Page] = field(default_factory=dict)
    left: list[tuple[bool, Extent]] = field(default_factory=list)
    """Places to be freed: whether on disk."""
    answer: Answer = Answer.TAKEN
    outstanding: int = 0
    """Pages ordered and not reported for good; `settled` is set when there are none."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    _times_asked: int = 0

    async def call(self, report: ReportMoves, _: type[MovesTaken]) -> MovesTaken:
        self._times_asked += 1
        if self.answer is Answer.REFUSED:
            self._settle(report)
            raise StaleEpoch("one of the two segments is not what it was")
        if self.answer is Answer.UNHEARD:
            self._settle(report)
            raise Unavailable("no answer")
        refused = self._take(report)
        if self.answer is Answer.HEARD_BUT_NOT_ANSWERED or (
            self.answer is Answer.FIRST_LOST and self._times_asked == 1
        ):
            if self.answer is Answer.HEARD_BUT_NOT_ANSWERED:
                self._settle(report)
            raise Unavailable("the answer was lost")
        self._settle(report)
        return MovesTaken(refused)

    def _settle(self, report: ReportMoves) -> None:
        self.outstanding -= len(report.pages) + len(report.failed)
        self._times_asked = 0
        if self.outstanding == 0:
            self.settled.set()

    def _take(self, report: ReportMoves) -> list[int]:
        half = len(report.pages) // 2 if self.answer is Answer.HALF_REFUSED else 0
        for moved in report.pages[half:]:
            page = self.pages[moved.key]
            if page.place == moved.source:
                self.left.append((page.is_on_disk, page.place))
                page.place, page.is_on_disk = moved.target, report.target_node.endswith("/disk")
        return list(range(half))


class DaemonMachine(RuleBasedStateMachine):
    """Real allocator, puts, disk and mover; only the meta server is played."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.now = 0.0
        self.number = 0
        self.index = Index()
        self._start()

    def _start(self) -> None:
        self.memory = MemorySegment(SEGMENT_BYTES)
        self.puts = PutTable(ExtentAllocator(SEGMENT_BYTES), lambda: self.now)
        self.store = DiskStore(self.directory, DISK_BYTES, FILE_BYTES, fsync=False)
        self.store.recover(lambda: False)
        segments = [
            Segment(node, b"e" * 16, "127.0.0.1", 1, "", SEGMENT_BYTES, disk_of)
            for node, disk_of in (("a", ""), ("a/disk", "a"))
        ]
        client: Any = self.index
        self.mover = Mover(client, self.memory, self.puts, self.store, (segments[0], segments[1]), DaemonMetrics())

    @rule(end=st.sampled_from(list(End)), count=st.integers(1, 4), units=st.integers(1, 3), late_s=st.integers(0, 2))
    def put(self, end: End, count: int, units: int, late_s: int) -> None:
        self.number += 1
        put_id, page_bytes = self.number.to_bytes(16, "big"), HEADER_BYTES + units * ALIGNMENT_BYTES
        try:
            extents = self.puts.allocate(put_id, count, page_bytes, PUT_TIMEOUT_S)
        except SegmentFull:
            return
        # By number, not at random: what is drawn from the index by its order must be the same when an example is run again.
        keys = [put_id + number.to_bytes(16, "big") for number in range(count)]
        written = {key: self._write(extent, page_bytes) for key, extent in zip(keys, extents, strict=True)}
        if end is End.GIVEN_UP:
            self.puts.release(put_id)
        elif end is not End.COMMITTED:
            self.now += PUT_TIMEOUT_S + 1 + late_s
        assert (put_id in self.puts.undecided()) is (end is not End.COMMITTED)
        if end in (End.COMMITTED, End.COMMITTED_LATE):
            for (key, data), extent in zip(written.items(), extents, strict=True):
                self._write_header(extent, key, len(data))
                self.index.pages[key] = Page(extent, False, data)
            self.puts.commit([put_id])
        else:
            self.puts.void([put_id])

    def _write(self, extent: Extent, page_bytes: int) -> bytes:
        data = random.Random(extent.generation).randbytes(page_bytes - HEADER_BYTES)
        self.memory.memory[extent.offset + HEADER_BYTES : extent.offset + page_bytes] = data
        return data

    def _write_header(self, extent: Extent, key: bytes, data_bytes: int) -> None:
        header = PageHeader(NAMESPACE, BlockKey(key), extent.generation, data_bytes, (1,)).pack()
        self.memory.memory[extent.offset : extent.offset + len(header)] = header

    @precondition(lambda self: self.index.pages)
    @rule(data=st.data(), answer=st.sampled_from(list(Answer)), is_disk_sick=st.booleans())
    def move(self, data: st.DataObject, answer: Answer, is_disk_sick: bool) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.index.pages)), unique=True, min_size=1))
        pages = [self.index.pages[key] for key in keys]
        orders = {
            is_on_disk: [
                Move(page.place, HEADER_BYTES + len(page.data)) for page in pages if page.is_on_disk is is_on_disk
            ]
            for is_on_disk in (False, True)
        }
        self._carry_out(orders[False], orders[True], answer, is_disk_sick=is_disk_sick)

    @precondition(lambda self: self.store.sparse())
    @rule(answer=st.sampled_from(list(Answer)))
    def compact(self, answer: Answer) -> None:
        extents = self.store.sparse()
        self.mover.compact(extents)
        self._carry_out([], [], answer, is_disk_sick=False, num_others=len(extents))

    def _carry_out(
        self, demoted: list[Move], promoted: list[Move], answer: Answer, *, is_disk_sick: bool, num_others: int = 0
    ) -> None:
        self.index.answer = answer
        self.index.settled.clear()
        self.index.outstanding = len(demoted) + len(promoted) + num_others
        is_given_up = answer in (Answer.UNHEARD, Answer.HEARD_BUT_NOT_ANSWERED)

        def fail(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        async def run() -> None:
            self.mover.demote(demoted)
            self.mover.promote(promoted)
            running = asyncio.create_task(self.mover.run())
            if self.index.outstanding:
                await self.index.settled.wait()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        with (
            patch.object(mover_module, "REPORT_RETRY_S", 0.0),
            patch.object(mover_module, "REPORT_TIMEOUT_S", -1.0 if is_given_up else 60.0),
            patch.object(store_module.os, "pwrite", fail if is_disk_sick else os.pwrite),
        ):
            self.loop.run_until_complete(run())
        if answer is Answer.HEARD_BUT_NOT_ANSWERED:
            # Readers find nothing at the places that were taken, and report that.
            self._pass_grace()
            for key in [key for key, page in self.index.pages.items() if self._read(page) is None]:
                page = self.index.pages.pop(key)
                self._free(page.is_on_disk, page.place)
        for is_on_disk, place in self.index.left:
            self._free(is_on_disk, place)
        self.index.left.clear()

    @precondition(lambda self: self.index.pages)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        for key in data.draw(st.lists(st.sampled_from(sorted(self.index.pages)), unique=True)):
            page = self.index.pages.pop(key)
            self._free(page.is_on_disk, page.place)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self._start()
        self.index.pages = {key: page for key, page in self.index.pages.items() if page.is_on_disk}
        known = {page.place for page in self.index.pages.values()}
        self.store.free([extent for extent in self.store.extents() if extent not in known])

    def _pass_grace(self) -> None:
        self.now += FREE_GRACE_S
        self.puts.free_due()

    def _free(self, is_on_disk: bool, place: Extent) -> None:
        if is_on_disk:
            self.store.free([place])
        else:
            self.puts.order_free([place])

    def _read(self, page: Page) -> bytearray | None:
        if page.is_on_disk:
            return self.store.read(page.place)
        return read_page(self.memory, self.puts, Move(page.place, HEADER_BYTES + len(page.data)))

    @invariant()
    def at_rest_bytes_in_use_are_those_of_the_index_and_right(self) -> None:
        self._pass_grace()
        used = {False: 0, True: 0}
        for key, page in self.index.pages.items():
            found = self._read(page)
            assert found is not None
            assert PageHeader.unpack(memoryview(found)[:HEADER_BYTES]).key == key
            assert found[HEADER_BYTES:] == page.data
            used[page.is_on_disk] += len(found)
        assert (self.puts.used_bytes, self.store.used_bytes) == (used[False], used[True])
        assert self.puts.num_open == 0

    def teardown(self) -> None:
        self.loop.close()
        self.store.close()
        shutil.rmtree(self.directory)


TestDaemon = DaemonMachine.TestCase
TestDaemon.settings = settings(max_examples=40, stateful_step_count=25)
