"""Pages in append-only files of one directory: the fourth tier of one daemon.

    directory/  epoch        names this directory; places are void without it
                lock         held by the daemon that uses it
                00000001.pages, …   sealed pages one after another; the last file grows, the others only lose pages

An extent's offset is the file's number in its upper 32 bits and the position in its lower 32. Numbers are never used again,
so a place of a page that is gone leads nowhere. Thread-safe. `recover` comes first: nothing is known before.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmp.disk.directory import epoch, locked, scan
from dmp.disk.seal import is_whole, seal
from dmp.errors import DiskFailed, DiskFull
from stratakv.errors import SetupError
from stratakv.layout import HEADER_BYTES, PageHeader
from stratakv.log import EventLogger
from stratakv.pool.errors import OutOfBounds
from stratakv.wire import Extent

POSITION_BITS = 32
FILE_BYTES_MAX = 1 << POSITION_BITS
SLACK_FILES = 2
"""Room for what is no longer in use, and for the copies by which it is given up."""
COMPACT_LIVE_SHARE = 0.5
"""A file of which less is in use is given up: its pages move to the newest file."""
READ_AHEAD_BYTES = 1024 * 1024
RETRY_S = 30.0
"""A disk that refused a write is tried again so much later."""
STALL_S = 5.0
"""A disk that takes longer for one batch of pages counts as refusing until it has taken it."""
_SUFFIX = ".pages"
log = EventLogger("dmp.disk")


@dataclass(frozen=True, slots=True)
class StoredPage:
    """One page, as its header says."""

    namespace: bytes
    key: bytes
    page_bytes: int


@dataclass(slots=True)
class _File:
    """`size_bytes` long, of which `live_bytes` are pages in use."""

    path: Path
    size_bytes: int = 0
    live_bytes: int = 0

    @property
    def live_share(self) -> float:
        return self.live_bytes / self.size_bytes if self.size_bytes else 0.0


class DiskStore:
    """All files of one directory."""

    def __init__(self, directory: Path, size_bytes: int, file_bytes: int, *, fsync: bool = True) -> None:
        """Takes the directory, which is made if it is missing. Raises SetupError."""
        self.size_bytes = size_bytes
        self._file_bytes = min(file_bytes, FILE_BYTES_MAX)
        self._fsync = fsync
        self._directory = directory
        self._lock = threading.Lock()
        """Of the tables below; never held while the disk works."""
        self._writing = threading.Lock()
        self._files: dict[int, _File] = {}
        self._pages: dict[Extent, StoredPage] = {}
        self._freed: dict[Extent, None] = {}
        self._active = 0
        """The file that grows; 0 for none."""
        self._written_to = 0
        """The file that is being written to just now."""
        self._next_number = 1
        self._failed_at: float | None = None
        self._write_began: float | None = None
        self.write_failures = 0
        self.damaged_pages = 0
        """That were read and were not as they had been written."""
        self.skipped_bytes = 0
        """Of the files, at the start, that no whole page was found in."""
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._claim = locked(directory / "lock")
            self.epoch = epoch(directory / "epoch")
        except OSError as error:
            raise SetupError(f"dmp.disk_dir: {directory}: {error.strerror}") from error

    @property
    def used_bytes(self) -> int:
        """Of pages in use."""
        with self._lock:
            return sum(file.live_bytes for file in self._files.values())

    @property
    def stored_bytes(self) -> int:
        """Length of all files, with what is no longer in use in them: at most `size_bytes` and SLACK_FILES files."""
        with self._lock:
            return self._stored_bytes()

    @property
    def num_pages(self) -> int:
        return len(self._pages)

    @property
    def is_read_only(self) -> bool:
        """Since the disk refused a write, for a while; or as long as a write does not come back."""
        failed_at, began, now = self._failed_at, self._write_began, time.monotonic()
        return (failed_at is not None and now - failed_at < RETRY_S) or (began is not None and now - began > STALL_S)

    def close(self) -> None:
        """Let go of the directory. Safe to repeat."""
        self._claim.close()

    # Start

    def recover(self, should_stop: Callable[[], bool]) -> None:
        """Read and check every page there is; what is damaged or torn is not known afterwards. Blocks."""
        found = sorted(int(path.stem) for path in self._directory.glob("*" + _SUFFIX) if path.stem.isdigit())
        self._next_number = max(found, default=0) + 1
        for number in found:
            path = self._path(number)
            file = _File(path, path.stat().st_size)
            pages = {}
            for position, header, page_bytes in scan(path, should_stop):
                extent = Extent(number << POSITION_BITS | position, header.generation)
                pages[extent] = StoredPage(header.namespace, header.key, page_bytes)
                file.live_bytes += page_bytes
            with self._lock:
                self._files[number] = file
                self._pages.update(pages)
                self.skipped_bytes += file.size_bytes - file.live_bytes
                empty = self._drop_if_empty(number)
            _unlink(empty)
        log.info("disk_recovered", directory=str(self._directory), pages=len(self._pages), files=len(self._files))

    def extents(self) -> list[Extent]:
        """Of all pages in use."""
        with self._lock:
            return list(self._pages)

    def page(self, extent: Extent) -> StoredPage | None:
        """None if there is no such page."""
        return self._pages.get(extent)

    # Bytes

    def append(self, pages: Sequence[bytearray]) -> list[Extent]:
        """Seal and write pages; durable on return. Raises DiskFull, DiskFailed; nothing of the batch is in use then."""
        size_bytes = sum(map(len, pages))
        with self._writing:
            with self._lock:
                if self._stored_bytes() + size_bytes > self.size_bytes + SLACK_FILES * self._file_bytes:
                    raise DiskFull(f"the disk tier at {self._directory} has no room for {size_bytes} bytes")
                number, file = self._writable()
                self._written_to = number
            start = file.size_bytes
            self._write_began = time.monotonic()
            try:
                self._write(file.path, start, pages)
            except OSError as error:
                self._fail(number, error)
                raise DiskFailed(f"{file.path}: {error.strerror}") from error
            finally:
                self._write_began = None
            self._failed_at = None
            with self._lock:
                self._written_to = 0
                file.size_bytes += size_bytes
                return self._enter(number, start, pages)

    def read(self, extent: Extent) -> bytearray | None:
        """A whole page, checked; None if it is gone, damaged, or another page."""
        page = self.page(extent)
        if page is None:
            return None
        data = bytearray(page.page_bytes)
        try:
            self.read_into([(extent.offset, memoryview(data))])
        except OutOfBounds:
            data.clear()
        if is_whole(data) and _is_page(data, page, extent):
            return data
        with self._lock:
            self.damaged_pages += extent in self._pages
        return None

    def read_into(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill buffers from these offsets, unchecked. Raises OutOfBounds for what is not there or cannot be read."""
        descriptor, opened = -1, -1
        try:
            for offset, into in ranges:
                number, position = offset >> POSITION_BITS, offset & (FILE_BYTES_MAX - 1)
                if number != opened:
                    if descriptor >= 0:
                        os.close(descriptor)
                    descriptor, opened = -1, number
                    descriptor = os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC)
                    if len(into) <= HEADER_BYTES:
                        # Whoever reads headers reads the pages next.
                        os.posix_fadvise(descriptor, position, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
                if os.preadv(descriptor, [into], position) != len(into):
                    raise OutOfBounds("a range lies beyond the end of its file")
        except OSError as error:
            raise OutOfBounds(f"the page cannot be read: {error.strerror}") from error
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    # Freeing

    def free(self, extents: Sequence[Extent]) -> None:
        """These pages are not wanted any more. Idempotent."""
        empty: list[Path] = []
        with self._lock:
            for extent in extents:
                page = self._pages.pop(extent, None)
                self._freed[extent] = None
                if page is not None:
                    number = extent.offset >> POSITION_BITS
                    self._files[number].live_bytes -= page.page_bytes
                    empty += self._drop_if_empty(number)
        _unlink(empty)

    def freed(self, count_max: int) -> list[Extent]:
        """Freed and not yet confirmed as reported."""
        with self._lock:
            return [extent for extent, _ in zip(self._freed, range(count_max), strict=False)]

    def confirm_freed(self, extents: Sequence[Extent]) -> None:
        with self._lock:
            for extent in extents:
                self._freed.pop(extent, None)

    def sparse(self) -> list[Extent]:
        """Pages of the file that is most out of use, if there is one that is worth giving up or if room is short."""
        with self._lock:
            closed = [number for number in self._files if number != self._active]
            number = min(closed, key=lambda n: self._files[n].live_share, default=0)
            share_max = 1.0 if self._stored_bytes() > self.size_bytes else COMPACT_LIVE_SHARE
            if not number or self._files[number].live_share >= share_max:
                return []
            return [extent for extent in self._pages if extent.offset >> POSITION_BITS == number]

    def _stored_bytes(self) -> int:
        return sum(file.size_bytes for file in self._files.values())

    def _write(self, path: Path, position: int, pages: Sequence[bytearray]) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for page in pages:
                seal(page)
                _write_whole(descriptor, page, position)
                position += len(page)
            if self._fsync:
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _writable(self) -> tuple[int, _File]:
        file = self._files.get(self._active)
        if file is not None and file.size_bytes < self._file_bytes:
            return self._active, file
        self._active = self._next_number
        self._next_number += 1
        file = self._files[self._active] = _File(self._path(self._active))
        return self._active, file

    def _enter(self, number: int, position: int, pages: Sequence[bytearray]) -> list[Extent]:
        extents = []
        for page in pages:
            header = PageHeader.unpack(memoryview(page)[:HEADER_BYTES])
            extent = Extent(number << POSITION_BITS | position, header.generation)
            self._pages[extent] = StoredPage(header.namespace, header.key, len(page))
            extents.append(extent)
            position += len(page)
        self._files[number].live_bytes += sum(map(len, pages))
        return extents

    def _fail(self, number: int, error: OSError) -> None:
        """What was written is dropped and the file never grows again: after a failed fsync nobody knows what it holds."""
        log.warning("disk_read_only", directory=str(self._directory), reason=error.strerror, retry_s=RETRY_S)
        self._failed_at = time.monotonic()
        self.write_failures += 1
        with self._lock:
            self._written_to = self._active = 0
            file = self._files[number]
            empty = self._drop_if_empty(number)
        if not empty:
            try:
                os.truncate(file.path, file.size_bytes)
            except OSError as failure:
                log.warning("disk_not_truncated", file=str(file.path), reason=failure.strerror)
        _unlink(empty)

    def _drop_if_empty(self, number: int) -> list[Path]:
        """Forget a file without pages; the caller removes it from the disk, which may take its time."""
        file = self._files[number]
        if number == self._written_to or file.live_bytes:
            return []
        if number == self._active:
            self._active = 0
        del self._files[number]
        return [file.path]

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08d}{_SUFFIX}"


def _is_page(data: bytearray, page: StoredPage, extent: Extent) -> bool:
    """Whether a disk that mixes up its blocks has not given another page, as whole as this one."""
    header = PageHeader.unpack(memoryview(data)[:HEADER_BYTES])
    return (header.namespace, header.key, header.generation) == (page.namespace, page.key, extent.generation)


def _write_whole(descriptor: int, data: bytearray, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("disk_file_not_removed", file=str(path), reason=error.strerror)
