"""What a storage can do, blocking: make room for an instance, be looked at, delete. Called by `files`, on a storage's own threads.

FileBackend      directories of a file system that the meta server and its clients have at the same path; no way out of the root
MooncakeBackend  keys of a Mooncake store, through Mooncake's own client, if that is installed
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from meta_server.kvcm.writes import Place, instance_directory, instance_directory_name

MOONCAKE_BUFFER_BYTES = 16 * 1024 * 1024
_NOT_FOUND = -704
"""Mooncake's code for a key that is not there."""


class Backend(Protocol):
    """One storage. Everything may block, and raises OSError."""

    def prepare(self, instance_id: str) -> None:
        """Make what an instance's clients write into."""

    def check(self) -> None:
        """Whether it can be written to."""

    def used_share(self) -> float | None:
        """Of its room, what is in use by anybody; None if it does not tell."""

    def delete(self, instance_id: str, names: Sequence[str]) -> None:
        """Objects of an instance; those that are not there count as deleted."""


class FileBackend:
    """Below a directory."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def prepare(self, instance_id: str) -> None:
        directory = instance_directory(self._place, instance_id)
        os.makedirs(directory, exist_ok=True)
        os.close(_open_directory(directory))

    def check(self) -> None:
        probe = Path(self._place.root) / f".stratakv-probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()

    def used_share(self) -> float | None:
        found = os.statvfs(self._place.root)
        usable = found.f_blocks - found.f_bfree + found.f_bavail
        return 1 - found.f_bavail / usable if usable else None

    def delete(self, instance_id: str, names: Sequence[str]) -> None:
        try:
            directory = _open_directory(instance_directory(self._place, instance_id))
        except FileNotFoundError:
            return
        try:
            for name in names:
                _unlink(name, directory)
        finally:
            os.close(directory)


def _open_directory(path: str) -> int:
    """An instance's own directory: clients may write there, so that it could be made a link to somewhere else."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _unlink(name: str, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return


class MooncakeBackend:
    """Keys in the store of one master."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._options = dict(place.options)
        self._lock = threading.Lock()
        self._store: Any = None

    def prepare(self, instance_id: str) -> None:
        """Nothing: a store has no directories."""

    def check(self) -> None:
        if self._client().health_check() < 0:
            self._store = None
            raise OSError(0, "Mooncake's client says that it is not well")

    def used_share(self) -> float | None:
        return None

    def delete(self, instance_id: str, names: Sequence[str]) -> None:
        client = self._client()
        for name in names:
            code = client.remove(object_key(instance_id, name))
            if code not in (0, _NOT_FOUND):
                raise OSError(0, f"Mooncake does not remove a key: its code is {code}")

    def _client(self) -> Any:
        with self._lock:
            if self._store is None:
                try:
                    store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
                except ImportError as error:
                    raise OSError(0, f"Mooncake's client cannot be used here: {error}") from None
                option = self._options.get
                code = store.setup(
                    option("local_hostname") or "localhost",
                    option("metadata_connstring") or "P2PHANDSHAKE",
                    0,
                    MOONCAKE_BUFFER_BYTES,
                    option("protocol") or "tcp",
                    option("rdma_device") or "",
                    self._place.root,
                )
                if code != 0:
                    raise OSError(0, f"Mooncake's client cannot reach {self._place.root}: its code is {code}")
                self._store = store
            return self._store


def object_key(instance_id: str, name: str) -> str:
    """By which clients put a part of a block into a Mooncake store."""
    return f"{instance_directory_name(instance_id)}/{name}"


def make_backend(place: Place) -> Backend:
    return MooncakeBackend(place) if place.scheme == "mooncake" else FileBackend(place)
