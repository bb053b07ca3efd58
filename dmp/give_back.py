"""While the meta server lets the daemon use only a part of its segment, the host gets back the memory of what is free.

The segment keeps its size, since other processes map it: holes are made in it.
"""

from __future__ import annotations

import asyncio
import errno

from dmp.puts import PutTable
from dmp.segment import MemorySegment
from stratakv.log import EventLogger

ROUND_S = 2.0
PART_BYTES = 64 * 1024 * 1024
"""In one go: nobody gets extents meanwhile."""
log = EventLogger("dmp.give_back")


async def give_back_unused(memory: MemorySegment, puts: PutTable) -> None:
    """Run until cancelled. What was given back before costs next to nothing."""
    while True:
        if puts.limit_bytes:
            try:
                await _one_round(memory, puts)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                log.warning("memory_not_given_back", reason=error.strerror)
        await asyncio.sleep(ROUND_S)


async def _one_round(memory: MemorySegment, puts: PutTable) -> None:
    at: int | None = 0
    while at is not None and puts.limit_bytes:
        at = await asyncio.to_thread(puts.give_back, at, PART_BYTES, memory.give_back)
