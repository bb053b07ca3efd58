"""What the integration tells SGLang's metrics: counters in the process's default registry, which SGLang serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import Counter

ASKED = Counter("stratakv_sglang_pages_asked", "Pages that SGLang looked up in the pool", ["pool"])
FOUND = Counter("stratakv_sglang_pages_found", "Pages of these that the pool had", ["pool"])
LOADED = Counter("stratakv_sglang_pages_loaded", "Pages loaded and verified", ["pool"])
LOST = Counter("stratakv_sglang_pages_lost", "Pages that were to be loaded and could not be", ["pool"])
STORED = Counter("stratakv_sglang_pages_stored", "Pages the pool has after they were given to it", ["pool"])
REFUSED = Counter("stratakv_sglang_pages_refused", "Pages given to the pool that it has not", ["pool"])
FAILURES = Counter("stratakv_sglang_failures", "Calls of SGLang that failed as misses, by reason", ["call", "reason"])

GIB = 1024**3
SAMPLES_MAX = 10_000
"""Batches kept between two readings by SGLang."""


@dataclass(slots=True)
class Transfers:
    """Batches since SGLang asked last: pages of each, and GiB/s."""

    pages: list[int] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def timed(self, num_pages: int, page_bytes: int) -> Iterator[None]:
        """One batch."""
        started = time.perf_counter()
        yield
        seconds = max(time.perf_counter() - started, 1e-9)
        with self._lock:
            if len(self.pages) < SAMPLES_MAX:
                self.pages.append(num_pages)
                self.bandwidth.append(num_pages * page_bytes / seconds / GIB)

    def take(self) -> tuple[list[int], list[float]]:
        """And forget them."""
        with self._lock:
            taken = self.pages, self.bandwidth
            self.pages, self.bandwidth = [], []
        return taken


def looked_up(pool: str, asked: int, found: int) -> None:
    ASKED.labels(pool).inc(asked)
    FOUND.labels(pool).inc(found)


def loaded(pool: str, pages: Sequence[bool]) -> None:
    LOADED.labels(pool).inc(sum(pages))
    LOST.labels(pool).inc(len(pages) - sum(pages))


def stored(pool: str, pages: Sequence[bool]) -> None:
    STORED.labels(pool).inc(sum(pages))
    REFUSED.labels(pool).inc(len(pages) - sum(pages))


def failed(call: str, reason: str) -> None:
    FAILURES.labels(call, reason).inc()
