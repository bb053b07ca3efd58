"""address_space: what the bookkeeping of a large pool costs, with no bytes behind it.

Pages of 360 KiB fill a pool of several segments, 100 at a time: extents come from each segment's allocator (a daemon's part),
keys go into the block index (the meta server's). At each tenth of the pool the time to allocate and insert a page, and to look
up a prefix of 400 keys, is taken; then pages go and come at random while the pool stays full. One more segment is churned with
pages of several sizes, to see what is lost to fragmentation. The pool is 1 TiB; --tib 10 needs 9 GB of memory.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.harness import parse_options, report
from dmp.allocator import ExtentAllocator
from meta_server.index import BlockIndex
from meta_server.page_arrays import ExtentArray
from stratakv.keys import KEY_BYTES
from stratakv.layout import HEADER_BYTES
from stratakv.pool.errors import SegmentFull
from stratakv.wire import Extent

TIB = 1 << 40
PAGE_BYTES = 360 * 1024
SEGMENTS = 8
PUT_PAGES = 100
LOOKUP_KEYS = 400
LOOKUPS = 50
"""After each tenth, of different prefixes: those that were looked up a moment ago would be in the processor's caches."""
STEPS = 10
CHURN_PAGES = 100_000
NAMESPACE = b"n" * 16
MIXED_KIB = (64, 128, 360, 1024, 4096)
MIXED_SEGMENT_BYTES = 64 << 30
MIXED_USED_SHARE = 0.95
MIXED_ROUNDS = 30_000
ResultT = TypeVar("ResultT")


class Timer:
    """Seconds spent in calls."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, call: Callable[[], ResultT]) -> ResultT:
        started = time.perf_counter()
        result = call()
        self.seconds.append(time.perf_counter() - started)
        return result

    def us(self, divisor: int = 1) -> float:
        """Median of what was measured since the last time, each divided."""
        median = statistics.median(self.seconds) * 1e6 / divisor
        self.seconds.clear()
        return round(median, 2)


class Pool:
    """Allocators and index of a pool, and some of the keys in it."""

    def __init__(self, size_bytes: int, rng: np.random.Generator) -> None:
        self._rng = rng
        self.allocators = [ExtentAllocator(size_bytes // SEGMENTS) for _ in range(SEGMENTS)]
        self.index = BlockIndex()
        for segment in range(SEGMENTS):
            self.index.set_available(segment, True)
        self.prefixes: list[bytes] = []
        """Of LOOKUP_KEYS keys each, from puts all over the pool."""
        self.allocate, self.insert, self.lookup = Timer(), Timer(), Timer()

    def fill(self, num_puts: int) -> None:
        """So many puts, over all segments in turn; every prefix to be looked up later takes a few of them."""
        kept: list[bytes] = []
        per_prefix = LOOKUP_KEYS // PUT_PAGES
        every = max(1, num_puts // (LOOKUPS * per_prefix))
        for put in range(num_puts):
            keys = self._rng.bytes(PUT_PAGES * KEY_BYTES)
            self._put(put % SEGMENTS, keys)
            if put % every == 0:
                kept.append(keys)
        self.prefixes += [
            b"".join(kept[at : at + per_prefix]) for at in range(0, len(kept) - per_prefix + 1, per_prefix)
        ]

    def _put(self, segment: int, keys: bytes) -> None:
        extents = self.allocate(lambda: self.allocators[segment].allocate(PUT_PAGES, PAGE_BYTES))
        places: ExtentArray = np.array([(extent.offset, extent.generation) for extent in extents], np.int64)
        self.insert(lambda: self.index.insert(NAMESPACE, keys, segment, places, PAGE_BYTES))

    def look_up(self, rng: random.Random) -> None:
        for prefix in rng.sample(self.prefixes, LOOKUPS):
            slots = self.lookup(lambda prefix=prefix: self._match(prefix))  # type: ignore[misc]
            assert slots == LOOKUP_KEYS, "a page that was put was not found"

    def _match(self, prefix: bytes) -> int:
        slots = self.index.match(NAMESPACE, prefix)
        self.index.touch(slots)
        self.index.places(slots)
        return len(slots)

    def churn(self, num_pages: int) -> float:
        """Microseconds to replace a page by another one at a random place, both sides counted."""
        num_pages -= num_pages % PUT_PAGES
        started = time.perf_counter()
        for put in range(num_pages // PUT_PAGES):
            segment = put % SEGMENTS
            victims = np.unique(self._rng.integers(0, self.index.num_blocks, PUT_PAGES))
            victims = victims[self.index.segments(victims) >= 0]
            removed = self.index.remove(victims)
            for owner, (offset, generation) in zip(removed.segments.tolist(), removed.extents.tolist(), strict=True):
                self.allocators[owner].free(Extent(offset, generation))
            try:
                self._put(segment, self._rng.bytes(PUT_PAGES * KEY_BYTES))
            except SegmentFull:
                continue  # the pages that went lay on other segments
        return round((time.perf_counter() - started) * 1e6 / num_pages, 2)

    @property
    def metadata_bytes(self) -> int:
        return self.index.size_bytes + sum(allocator.metadata_bytes for allocator in self.allocators)


def resident_bytes() -> int:
    """Memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


def mixed_churn(rng: random.Random, num_rounds: int) -> dict[str, Any]:
    """Batches of pages of several sizes come and go at random while a segment stays at MIXED_USED_SHARE."""
    allocator = ExtentAllocator(MIXED_SEGMENT_BYTES)
    batches: list[list[Extent]] = []
    sizes = [HEADER_BYTES + kib * 1024 for kib in MIXED_KIB]
    refused = 0
    usable: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(num_rounds):
        size, count = rng.choice(sizes), rng.randint(1, 128)
        while allocator.used_bytes + count * size > MIXED_USED_SHARE * allocator.size_bytes:
            at = rng.randrange(len(batches))
            batches[at], batches[-1] = batches[-1], batches[at]
            for extent in batches.pop():
                allocator.free(extent)
        try:
            batches.append(allocator.allocate(count, size))
        except SegmentFull:
            refused += 1
        if number > num_rounds // 2 and number % (num_rounds // 100) == 0:
            runs = list(allocator.free_runs().values())
            for size, shares in usable.items():
                shares.append(sum(run - run % size for run in runs) / sum(runs))
    return {
        "used_share": MIXED_USED_SHARE,
        "refused_batches": refused,
        "usable_share_of_free_by_kib": {
            str(kib): round(statistics.median(usable[size]), 3) for kib, size in zip(MIXED_KIB, sizes, strict=True)
        },
        "usable_share_of_free_least": round(min(map(min, usable.values())), 3),
    }


def main() -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tib", type=float, default=1.0, help="size of the pool")

    options = parse_options(__doc__, add)
    tib = min(options.tib, 0.25) if options.quick else options.tib
    rng = random.Random(options.seed)
    gc.disable()  # nothing here is cyclic, and its passes would be measured
    before = resident_bytes()
    pool = Pool(int(tib * TIB) // SEGMENTS // (1 << 21) * (1 << 21) * SEGMENTS, np.random.default_rng(options.seed))
    num_puts = sum(a.size_bytes // (PUT_PAGES * PAGE_BYTES) for a in pool.allocators) // STEPS // SEGMENTS * SEGMENTS
    steps: list[dict[str, Any]] = []
    for _ in range(STEPS):
        pool.fill(num_puts)
        pool.look_up(rng)
        steps.append(
            {
                "pages": pool.index.num_blocks,
                "allocate_us_per_page": pool.allocate.us(PUT_PAGES),
                "insert_us_per_page": pool.insert.us(PUT_PAGES),
                "lookup_400_us": pool.lookup.us(),
            }
        )
    num_pages = pool.index.num_blocks
    resident = resident_bytes() - before
    metadata = pool.metadata_bytes
    churn_us = pool.churn(CHURN_PAGES // 10 if options.quick else CHURN_PAGES)
    first, last = steps[0], steps[-1]
    report(
        "address_space",
        {"tib": tib, "segments": SEGMENTS, "page_bytes": PAGE_BYTES, "quick": options.quick, "seed": options.seed},
        {
            "pages": num_pages,
            "metadata_bytes_per_page": round(metadata / num_pages, 1),
            "resident_bytes_per_page": round(resident / num_pages, 1),
            "metadata_share": round(metadata / num_pages / PAGE_BYTES, 6),
            "by_tenth": steps,
            "churn_us_per_page": churn_us,
            "mixed_sizes": mixed_churn(rng, MIXED_ROUNDS // 10 if options.quick else MIXED_ROUNDS),
        },
        {},
        {
            f"{what}_full_over_tenth": round(last[key] / first[key], 2)
            for what, key in (
                ("allocate", "allocate_us_per_page"),
                ("insert", "insert_us_per_page"),
                ("lookup_400", "lookup_400_us"),
            )
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
