"""Worker profiles on disk: one small JSON file for each model, dtype, device and number of threads.

Written by workers, shown by `stratakv profile`. A file that cannot be read is as good as none.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from stratakv.log import EventLogger
from stratakv.worker_profile import WorkerProfile

log = EventLogger("stratakv.profile_store")

VALID_S = 7 * 24 * 3600.0
"""Older ones are measured again: drivers, other tenants of the machine and its clock change."""

LOCK_POLL_S = 0.05


class ProfileKey(msgspec.Struct, frozen=True):
    """What a profile is true of."""

    model: str
    revision: str
    dtype: str
    device: str
    """Name of the GPU or the processor."""
    threads: int
    kernels: str
    """What computes: changes with the code."""


class StoredProfile(msgspec.Struct, frozen=True):
    key: ProfileKey
    measured_at_unix_s: float
    profile: WorkerProfile

    def is_fresh(self, now_unix_s: float) -> bool:
        return 0 <= now_unix_s - self.measured_at_unix_s < VALID_S


class ProfileStore:
    """The profiles below a cache directory."""

    def __init__(self, cache_dir: Path) -> None:
        self.directory = cache_dir.expanduser() / "profiles"

    def find(self, key: ProfileKey) -> WorkerProfile | None:
        """The fresh one of this key."""
        stored = _read(self._path(key))
        if stored is None or stored.key != key or not stored.is_fresh(time.time()):
            return None
        return stored.profile

    def keep(self, key: ProfileKey, profile: WorkerProfile) -> None:
        """Replace what is there. A directory that cannot be written to is only logged."""
        stored = StoredProfile(key, time.time(), profile)
        path = self._path(key)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(stored), indent=1))
            unfinished.replace(path)
        except OSError as error:
            log.warning("profile_not_kept", path=str(path), error=str(error))

    @contextmanager
    def turn(self, wait_s: float) -> Iterator[None]:
        """Keep other processes of this machine from measuring meanwhile. After `wait_s` it goes on beside them."""
        deadline = time.monotonic() + wait_s
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / "lock").open("wb")
        except OSError as error:
            log.warning("profile_not_kept", path=str(self.directory), error=str(error))
            yield
            return
        with lock:
            while not _locked(lock) and time.monotonic() < deadline:
                time.sleep(LOCK_POLL_S)
            yield

    def all(self) -> list[StoredProfile]:
        """Those that can be read, also old ones, by model."""
        found = (_read(path) for path in sorted(self.directory.glob("*.json")))
        return sorted((stored for stored in found if stored is not None), key=lambda s: (s.key.model, s.key.dtype))

    def _path(self, key: ProfileKey) -> Path:
        return self.directory / f"{hashlib.sha256(msgspec.json.encode(key)).hexdigest()[:24]}.json"


def _locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> StoredProfile | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=StoredProfile)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("profile_not_readable", path=str(path), error=str(error))
        return None
