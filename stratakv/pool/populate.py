"""Brings a mapping's memory in ahead of its use: a first touch in the middle of a copy costs as much as the copy."""

from __future__ import annotations

import errno
import mmap
import time
from collections.abc import Callable

MADV_POPULATE_WRITE = 23
"""Linux 5.14; Python's mmap has no name for it."""
STEP_BYTES = 16 * 1024 * 1024
PAUSE_S = 0.002
"""Between steps, for those who need the cores now."""


def populate(memory: mmap.mmap, should_stop: Callable[[], bool]) -> None:
    """Populate all of it, in steps, on the caller's thread; where the kernel cannot, memory comes in as it is touched."""
    size_bytes = len(memory)
    for start in range(0, size_bytes, STEP_BYTES):
        if should_stop():
            return
        try:
            memory.madvise(MADV_POPULATE_WRITE, start, min(STEP_BYTES, size_bytes - start))
        except ValueError:
            return  # closed meanwhile
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOMEM, errno.EFAULT):
                return
            raise
        time.sleep(PAUSE_S)
