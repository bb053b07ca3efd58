"""Runs a program that ends with its parent, if need be as another account: `launch.py PARENT SIGNAL MODE UID GID PROGRAM …`.

The program gets SIGNAL when the thread of PARENT that started it ends, however that happens. MODE is `plain` (as we are),
`namespace` (a user namespace of its own, where root appears as UID) or `account` (become UID). A script of its own because
the parent may have threads: between fork and exec only a fresh interpreter is safe. Started by `stratakv up` and the
embedded PostgreSQL; uses the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1
EXIT_REFUSED = 77
"""The kernel or a sandbox does not allow the mode."""


def ending_with_us(
    ending: signal.Signals, program: list[str], *, mode: str = "plain", uid: int = 0, gid: int = 0
) -> list[str]:
    """The command line that runs `program` so that it gets `ending` when the calling thread ends."""
    values = (os.getpid(), int(ending), mode, uid, gid)
    return [sys.executable, "-I", "-S", __file__, *(str(value) for value in values), *program]


_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _enter_namespace(uid: int, gid: int) -> None:
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/gid_map").write_text(f"{gid} {outer_gid} 1\n")
    Path("/proc/self/uid_map").write_text(f"{uid} {outer_uid} 1\n")


def _become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def main() -> None:
    parent, ending, mode, uid, gid, program, *arguments = sys.argv[1:]
    try:
        if mode == "namespace":
            _enter_namespace(int(uid), int(gid))
        elif mode == "account":
            _become(int(uid), int(gid))
        # Last, because the kernel clears it whenever credentials change.
        _check(_libc.prctl(PR_SET_PDEATHSIG, int(ending)))
    except OSError as error:
        print(f"{mode}: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    if os.getppid() != int(parent):  # it died before we asked to be told
        sys.exit(1)
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
