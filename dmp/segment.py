"""The memory a daemon gives to the pool: one memfd, so that no kind of death leaves a file behind.

Its memory is brought in once, in the background (`populate`). The descriptor is handed to processes of the same host; it
is sealed, so that none of them can shrink it under the others.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from collections.abc import Callable

from stratakv.errors import SetupError
from stratakv.pool.mooncake import address_of
from stratakv.pool.populate import populate
from stratakv.wire import EPOCH_BYTES

SEGMENT_ALIGNMENT_BYTES = 2 * 1024 * 1024
"""Sizes are multiples of a huge page."""
SOCKET_NAME_PREFIX = "stratakv-dmp-"


class MemorySegment:
    """Owner of the memfd and of the daemon's own mapping of it."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = _checked_size(size_bytes)
        self.epoch = secrets.token_bytes(EPOCH_BYTES)
        self.fd = os.memfd_create("stratakv-dmp", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.size_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._map = mmap.mmap(self.fd, self.size_bytes)
        self.memory = memoryview(self._map)

    def populate(self, should_stop: Callable[[], bool]) -> None:
        """Bring all of it in; blocks."""
        populate(self._map, should_stop)

    def give_back(self, start: int, size_bytes: int) -> None:
        """The host gets this memory; whoever touches it next finds zeros."""
        self._map.madvise(mmap.MADV_REMOVE, start, size_bytes)

    @property
    def address(self) -> int:
        """Where the segment lies in this process."""
        return address_of(self._map)

    @property
    def socket_name(self) -> str:
        """Abstract Unix socket of this epoch, without the leading NUL."""
        return SOCKET_NAME_PREFIX + self.epoch.hex()


def _checked_size(size_bytes: int) -> int:
    if size_bytes < SEGMENT_ALIGNMENT_BYTES or size_bytes % SEGMENT_ALIGNMENT_BYTES:
        raise SetupError(f"dmp.segment_bytes = {size_bytes}: must be a positive multiple of 2MiB")
    physical_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size_bytes > physical_bytes:
        raise SetupError(f"dmp.segment_bytes = {size_bytes}: this machine has {physical_bytes} bytes of memory")
    return size_bytes
