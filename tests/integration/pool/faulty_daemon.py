"""A real daemon, run as a module, that halts at one step of moving pages, or whose disk has a fault.

HALT_AT    DIRECTION:STEP, with a Direction of `dmp.metrics` and a Step; "halted" is printed, and the step never ends
FAULT      of the disk, a DiskFault, for as long as the file FAULT_WHILE exists

What takes seconds in a daemon (trying a disk again, looking for files to give up) takes a fraction of one here.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dmp import service
from dmp.disk import node, store
from dmp.disk.mover import Mover
from dmp.metrics import Direction
from stratakv.process import run_service
from stratakv.wire import MovesTaken, ReportMoves

MODULE = "tests.integration.pool.faulty_daemon"
_pwrite, _fdatasync, _repeat, _appended = os.pwrite, os.fdatasync, Mover._repeat, Mover._appended


class Step(enum.StrEnum):
    """Where a batch of pages is."""

    TORN = "torn"
    """Half of its first page is in the file."""
    WRITTEN = "written"
    """In the file, but not known to be durable."""
    COPIED = "copied"
    """Durable, or in memory; nobody has been told."""
    REPORTED = "reported"
    """The meta server has taken it; the daemon does not know."""


class DiskFault(enum.StrEnum):
    """What is wrong with the disk."""

    STALL = "stall"
    FULL = "full"
    FAILS_TO_SYNC = "fails_to_sync"


class Halting:
    """Halts at one step of one direction."""

    def __init__(self, at: str) -> None:
        direction, step = at.split(":")
        self._direction, self._step = Direction(direction), Step(step)
        self._now: Direction | None = None

    def appended(self, mover: Mover, direction: Direction, *arguments: Any) -> Any:
        self._now = direction
        return _appended(mover, direction, *arguments)

    def pwrite(self, descriptor: int, data: Any, position: int) -> int:
        if self._is_at(Step.TORN, self._now):
            _pwrite(descriptor, data[: len(data) // 2], position)
            _halt()
        return _pwrite(descriptor, data, position)

    def fdatasync(self, descriptor: int) -> None:
        if self._is_at(Step.WRITTEN, self._now):
            _halt()
        _fdatasync(descriptor)

    async def repeat(self, mover: Mover, report: ReportMoves) -> MovesTaken:
        direction = _direction_of(report) if report.pages else None
        await self._halt_at(Step.COPIED, direction)
        answer = await _repeat(mover, report)
        await self._halt_at(Step.REPORTED, direction)
        return answer

    def _is_at(self, step: Step, direction: Direction | None) -> bool:
        return (step, direction) == (self._step, self._direction)

    async def _halt_at(self, step: Step, direction: Direction | None) -> None:
        if self._is_at(step, direction):
            print("halted", flush=True)
            await asyncio.Event().wait()


class FaultyDisk:
    """Writes go wrong while a file exists."""

    def __init__(self, fault: str, sign: str) -> None:
        self._fault = DiskFault(fault)
        self._sign = Path(sign)

    def pwrite(self, descriptor: int, data: Any, position: int) -> int:
        while self._fault is DiskFault.STALL and self._sign.exists():
            time.sleep(0.02)
        if self._fault is DiskFault.FULL and self._sign.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return _pwrite(descriptor, data, position)

    def fdatasync(self, descriptor: int) -> None:
        if self._fault is DiskFault.FAILS_TO_SYNC and self._sign.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        _fdatasync(descriptor)


def _direction_of(report: ReportMoves) -> Direction:
    from_disk, to_disk = (name.endswith("/disk") for name in (report.source_node, report.target_node))
    if from_disk and to_disk:
        return Direction.COMPACT
    return Direction.DEMOTE if to_disk else Direction.PROMOTE


def _halt() -> None:
    print("halted", flush=True)
    threading.Event().wait()


def _install() -> None:
    service.DISK_FILE_BYTES_MIN = 0
    store.RETRY_S, store.STALL_S, node.UPKEEP_S = 0.5, 0.3, 0.2
    hooks: Halting | FaultyDisk
    if at := os.environ.get("HALT_AT"):
        hooks = halting = Halting(at)
        Mover._appended = lambda mover, *arguments: halting.appended(mover, *arguments)  # type: ignore[method-assign]
        Mover._repeat = lambda mover, report: halting.repeat(mover, report)  # type: ignore[method-assign]
    else:
        hooks = FaultyDisk(os.environ["FAULT"], os.environ["FAULT_WHILE"])
    os.pwrite, os.fdatasync = hooks.pwrite, hooks.fdatasync  # type: ignore[assignment]


if __name__ == "__main__":
    _install()
    sys.exit(run_service("faulty", "A daemon with a fault.", ("dmp", "meta", "pool"), service.serve))
