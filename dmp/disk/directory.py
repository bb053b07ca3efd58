"""A disk tier's directory: who may use it, which epoch it has, and which pages its files hold. Used by `dmp.disk.store` only."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from dmp.disk.seal import is_whole, sealed_bytes
from stratakv.errors import SetupError
from stratakv.layout import ALIGNMENT_BYTES, HEADER_BYTES, CorruptPage, PageHeader
from stratakv.wire import EPOCH_BYTES


def scan(path: Path, should_stop: Callable[[], bool]) -> Iterator[tuple[int, PageHeader, int]]:
    """Position, header and length of every whole page of a file; goes on behind a damaged one."""
    with path.open("rb") as file:
        size_bytes, position = os.fstat(file.fileno()).st_size, 0
        while position + HEADER_BYTES <= size_bytes and not should_stop():
            file.seek(position)
            page = file.read(HEADER_BYTES)
            page_bytes = sealed_bytes(page)
            header = None
            if page_bytes is not None:
                page += file.read(page_bytes - HEADER_BYTES)
                header = _header(page)
            if header is None or page_bytes is None:
                position += ALIGNMENT_BYTES
                continue
            yield position, header, page_bytes
            position += page_bytes


def _header(page: bytes) -> PageHeader | None:
    try:
        return PageHeader.unpack(memoryview(page)[:HEADER_BYTES]) if is_whole(page) else None
    except CorruptPage:
        return None


def locked(path: Path) -> IO[bytes]:
    """The open lock file, which holds the directory until it is closed. Raises SetupError if another daemon has it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SetupError(f"dmp.disk_dir: {path.parent} is in use by another daemon") from None
    return file


def epoch(path: Path) -> bytes:
    """The directory's own, made once. Raises SetupError if it is damaged."""
    if not path.exists():
        scratch = path.with_suffix(".new")
        scratch.write_bytes(secrets.token_bytes(EPOCH_BYTES))
        scratch.rename(path)
    found = path.read_bytes()
    if len(found) != EPOCH_BYTES:
        raise SetupError(
            f"dmp.disk_dir: {path} is damaged", hint="Remove the directory: all of it can be computed again."
        )
    return found
