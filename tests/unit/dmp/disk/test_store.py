"""Pages on disk against a model, and what damage, torn tails, full and failing disks do to them."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dmp.disk import store as store_module
from dmp.disk.seal import is_whole, seal
from dmp.disk.store import DiskStore
from dmp.errors import DiskFailed, DiskFull
from stratakv.errors import SetupError
from stratakv.keys import BlockKey, Namespace
from stratakv.layout import ALIGNMENT_BYTES, HEADER_BYTES, PageHeader
from stratakv.pool.errors import OutOfBounds
from stratakv.wire import Extent

NAMESPACE = Namespace(b"n" * 16)
FILE_BYTES = 4 * 3 * ALIGNMENT_BYTES
CAPACITY_BYTES = 40 * ALIGNMENT_BYTES
STORED_BYTES_MAX = CAPACITY_BYTES + 2 * FILE_BYTES


def make_page(number: int, data_pages: int = 1) -> bytearray:
    """A page as a worker writes it; generation and key tell its number."""
    data = random.Random(number).randbytes(data_pages * ALIGNMENT_BYTES)
    header = PageHeader(NAMESPACE, BlockKey(number.to_bytes(32, "big")), number, len(data), (number,)).pack()
    return bytearray(header.ljust(HEADER_BYTES, b"\0") + data)


def unsealed(page: bytearray) -> bytes:
    """What the page's writer wrote of it."""
    return bytes(page[: HEADER_BYTES - 64] + page[HEADER_BYTES:])


def open_store(directory: Path, size_bytes: int = CAPACITY_BYTES) -> DiskStore:
    opened = DiskStore(directory, size_bytes, FILE_BYTES, fsync=False)
    opened.recover(lambda: False)
    return opened


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


class DiskModel(RuleBasedStateMachine):
    """Appends, frees, compaction and restarts in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.store = open_store(self.directory)
        self.epoch = self.store.epoch
        self.pages: dict[Extent, bytes] = {}
        self.number = 0

    @rule(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
    def append(self, sizes: list[int]) -> None:
        pages = []
        for size in sizes:
            self.number += 1
            pages.append(make_page(self.number, size))
        used = self.store.stored_bytes
        try:
            extents = self.store.append(pages)
        except DiskFull:
            assert used + sum(map(len, pages)) > STORED_BYTES_MAX
            return
        assert not self.pages.keys() & set(extents), "a place was given out again"
        self.pages.update(zip(extents, map(unsealed, pages), strict=True))

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.sampled_from(sorted(self.pages, key=lambda e: e.offset)), unique=True))
        self.store.free(gone)
        for extent in gone:
            del self.pages[extent]

    @rule()
    def compact(self) -> None:
        for extent in self.store.sparse():
            page = self.store.read(extent)
            assert page is not None
            try:
                moved = self.store.append([page])
            except DiskFull:
                return
            self.pages[moved[0]] = self.pages.pop(extent)
            self.store.free([extent])

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = open_store(self.directory)
        # What had been freed in a file that is still there is found again, until the meta server says otherwise.
        self.store.free([extent for extent in self.store.extents() if extent not in self.pages])

    @invariant()
    def every_page_is_as_it_was_written(self) -> None:
        assert set(self.store.extents()) == set(self.pages)
        for extent, content in self.pages.items():
            page = self.store.read(extent)
            assert page is not None
            assert unsealed(page) == content

    @invariant()
    def space_is_that_of_the_files(self) -> None:
        on_disk = sum(path.stat().st_size for path in self.directory.glob("*.pages"))
        assert on_disk == self.store.stored_bytes <= STORED_BYTES_MAX
        assert self.store.used_bytes == sum(len(content) + 64 for content in self.pages.values())
        assert self.store.epoch == self.epoch

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)


TestDiskModel = DiskModel.TestCase
TestDiskModel.settings = settings(max_examples=30, stateful_step_count=20)


def test_every_flipped_bit_is_found() -> None:
    page = make_page(1)
    seal(page)
    assert is_whole(page)
    for position in random.Random(0).sample(range(len(page)), 400):
        page[position] ^= 1 << position % 8
        # The bytes between the seal and the end of the header mean nothing.
        assert not is_whole(page) or HEADER_BYTES - 64 + 24 <= position < HEADER_BYTES
        page[position] ^= 1 << position % 8


def test_damaged_pages_are_gone_after_a_restart_and_their_neighbours_are_not(store: DiskStore, tmp_path: Path) -> None:
    extents = store.append([make_page(number) for number in range(1, 5)])
    store.close()
    path = next(tmp_path.glob("*.pages"))
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 17] ^= 4  # in the data of the first page
    content[4 * ALIGNMENT_BYTES + 9] ^= 1  # in the header of the third
    path.write_bytes(content)
    again = open_store(tmp_path)
    assert again.extents() == [extents[1], extents[3]]
    again.close()


def test_a_torn_tail_costs_only_the_page_it_tears(store: DiskStore, tmp_path: Path) -> None:
    extents = store.append([make_page(number) for number in range(1, 4)])
    store.close()
    path = next(tmp_path.glob("*.pages"))
    os.truncate(path, path.stat().st_size - 100)
    again = open_store(tmp_path)
    assert again.extents() == extents[:2]
    (extent,) = again.append([make_page(9)])
    assert extent not in extents, "a new page is never behind a torn one"
    again.close()


def test_a_page_that_is_damaged_meanwhile_is_not_given_out(store: DiskStore, tmp_path: Path) -> None:
    (extent,) = store.append([make_page(1)])
    with next(tmp_path.glob("*.pages")).open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"other bytes")
    assert store.read(extent) is None


def test_whole_pages_at_each_others_places_are_not_given_out(store: DiskStore, tmp_path: Path) -> None:
    extents = store.append([make_page(1), make_page(2)])
    path = next(tmp_path.glob("*.pages"))
    content, half = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes(content[half:] + content[:half])
    assert [store.read(extent) for extent in extents] == [None, None]
    assert store.damaged_pages == 2
    store.close()
    again = open_store(tmp_path)
    assert not set(again.extents()) & set(extents)
    again.close()


@pytest.mark.parametrize(("call", "error"), [("pwrite", errno.ENOSPC), ("pwrite", errno.EIO), ("fdatasync", errno.EIO)])
def test_a_disk_that_refuses_a_write_is_read_only_for_a_while(
    call: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path, CAPACITY_BYTES, FILE_BYTES)
    store.recover(lambda: False)
    (before,) = store.append([make_page(1)])
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> int:
            raise OSError(error, os.strerror(error))

        patch.setattr(store_module.os, call, fail)
        with pytest.raises(DiskFailed):
            store.append([make_page(2), make_page(3)])
    assert store.is_read_only
    assert store.extents() == [before]
    assert store.read(before) is not None, "what is there can still be read"
    (after,) = store.append([make_page(4)])
    assert not store.is_read_only
    assert after.offset >> 32 != before.offset >> 32, "a file that failed never grows again"
    store.close()
    again = open_store(tmp_path)
    assert set(again.extents()) == {before, after}
    again.close()


@pytest.mark.parametrize("offset", [0, 1 << 32, (1 << 32) + 10 * ALIGNMENT_BYTES, (99 << 32), (1 << 63) - 1])
def test_what_is_not_there_cannot_be_read(offset: int, store: DiskStore) -> None:
    if offset != 1 << 32:
        store.append([make_page(1)])
    with pytest.raises(OutOfBounds):
        store.read_into([(offset, memoryview(bytearray(ALIGNMENT_BYTES)))])


def test_a_directory_serves_one_daemon(store: DiskStore, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="in use by another daemon"):
        DiskStore(tmp_path, CAPACITY_BYTES, FILE_BYTES)
