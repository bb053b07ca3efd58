"""As whom PostgreSQL runs: it refuses root, so root runs it in a user namespace or as another account.

In order: we are not root · a user namespace, in which our own uid looks unprivileged (binaries and data stay where they are,
files stay ours) · the account `postgres` or `nobody`, which needs binaries and data it can reach.
"""

from __future__ import annotations

import enum
import os
import pwd
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from stratakv.errors import SetupError
from stratakv.launch import ending_with_us

_ACCOUNTS = ("postgres", "nobody")
_NOBODY_ID = 65534
_PROBE_TIMEOUT_S = 30


class Mode(enum.StrEnum):
    """How the launcher changes what PostgreSQL sees of its account."""

    PLAIN = "plain"
    NAMESPACE = "namespace"
    ACCOUNT = "account"


@dataclass(frozen=True, slots=True)
class Account:
    """Under which account, and how it is reached."""

    mode: Mode
    uid: int
    gid: int

    @property
    def outer_uid(self) -> int:
        """The uid other processes see, as SO_PEERCRED reports it."""
        return self.uid if self.mode is Mode.ACCOUNT else os.geteuid()

    def command(self, program: str, *arguments: str) -> list[str]:
        """The command line that runs `program` so that it gets SIGINT when the thread that started it ends."""
        return ending_with_us(signal.SIGINT, [program, *arguments], mode=self.mode, uid=self.uid, gid=self.gid)

    def can_reach(self, path: Path) -> bool:
        """Whether the account may enter every directory above `path`."""
        return all(_may_enter(parent.stat(), self) for parent in path.absolute().parents if parent.exists())


def choose_account() -> Account:
    """The first way that works here. Raises SetupError that says what was tried."""
    if os.geteuid() != 0:
        return Account(Mode.PLAIN, os.geteuid(), os.getegid())
    namespace = Account(Mode.NAMESPACE, _NOBODY_ID, _NOBODY_ID)
    tried = [_probe(namespace)]
    if not tried[0]:
        return namespace
    for name in _ACCOUNTS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            tried.append(f"account {name}: does not exist")
            continue
        account = Account(Mode.ACCOUNT, entry.pw_uid, entry.pw_gid)
        trouble = _probe(account)
        if not trouble:
            return account
        tried.append(f"{name}: {trouble}")
    raise SetupError(
        f"PostgreSQL refuses to run as root, and no other way works here ({'; '.join(tried)}).",
        hint="Run as an ordinary user, or set STRATAKV_DATABASE_URL to a server of your own.",
    )


def _probe(account: Account) -> str:
    """Empty if the launcher can take on the account, else why not."""
    done = subprocess.run(
        account.command("/bin/sh", "-c", "exit 0"),
        capture_output=True,
        text=True,
        timeout=_PROBE_TIMEOUT_S,
        check=False,
    )
    return "" if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"


def _may_enter(stat: os.stat_result, account: Account) -> bool:
    if account.mode is not Mode.ACCOUNT:
        return True
    shift = 6 if stat.st_uid == account.uid else 3 if stat.st_gid == account.gid else 0
    return bool(stat.st_mode >> shift & 1)
