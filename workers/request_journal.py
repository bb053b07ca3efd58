"""What each request took, written down when it ends: for DB nodes that settle the requests of one that is gone.

Two files, the older of which is dropped when the newer is full. A line is written at once, so that it outlives this process; a
machine that fails may lose the last ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from stratakv.errors import SetupError
from stratakv.log import EventLogger
from workers.engine.connector import Tier
from workers.engine.requests import RequestUsage

log = EventLogger("workers.journal")

FILE_BYTES_MAX = 4 * 1024 * 1024
REQUEST_ID_CHARS_MAX = 256
"""Longer ones are not written down."""
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(tuple[str, int, int, int]).decode


class RequestJournal:
    """Of one worker. `add` is called by the event loop; `find` may be by another thread."""

    def __init__(self, directory: Path, worker: str) -> None:
        """Raises SetupError."""
        self._path = directory / f"{worker.replace('/', '_')}.requests"
        self._older = self._path.with_suffix(".requests.1")
        self._is_warned = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise SetupError(f"worker.journal_dir: {self._path}: {error.strerror}") from error

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._size_bytes = os.fstat(self._file).st_size

    def add(self, request_id: str, usage: RequestUsage) -> None:
        """A request has ended."""
        if len(request_id) > REQUEST_ID_CHARS_MAX:
            return
        known = min(usage.prompt_tokens, sum(usage.tokens_by_tier.values()))
        cached = max(0, known - usage.tokens_by_tier.get(Tier.COMPUTED, 0))
        line = _encode((request_id, known, cached, usage.generated_tokens)) + b"\n"
        try:
            if self._size_bytes + len(line) > FILE_BYTES_MAX:
                os.close(self._file)
                os.replace(self._path, self._older)
                self._open()
            self._size_bytes += os.write(self._file, line)
        except OSError as error:
            if not self._is_warned:
                log.warning("journal_not_written", path=str(self._path), error=error.strerror)
            self._is_warned = True

    def find(self, request_ids: Iterable[str]) -> list[dict[str, Any]]:
        """Lines of these requests, under every name that DB nodes have given their attempts (`ID-0`, `ID-0p`, `ID-1` …)."""
        wanted = frozenset(request_ids)
        found: list[dict[str, Any]] = []
        for path in (self._older, self._path):
            if not path.exists():
                continue
            for line in path.read_bytes().splitlines():
                try:
                    request_id, prompt, cached, generated = _decode(line)
                except msgspec.DecodeError:
                    continue  # cut off by a full disk
                if request_id.rpartition("-")[0] in wanted:
                    tokens = {"prompt_tokens": prompt, "cached_tokens": cached, "generated_tokens": generated}
                    found.append({"request_id": request_id, **tokens})
        return found

    def close(self) -> None:
        os.close(self._file)
