"""What has happened to pages since the start, by tier: found, removed and why, and how old those were that had to go.

Written by the catalog, the reclaimer and the dispatch, on the event loop; read by `meta_server.metrics`.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from meta_server.nodes import Node

AGE_BOUNDS_S = (10.0, 60.0, 300.0, 1800.0, 3600.0, 6 * 3600.0, 24 * 3600.0, 7 * 24 * 3600.0, math.inf)


class Tier(enum.StrEnum):
    """What a segment is."""

    MEMORY = "memory"
    DISK = "disk"


def tier_of(node: Node) -> Tier:
    return Tier.DISK if node.segment.is_disk else Tier.MEMORY


@dataclass(slots=True)
class Histogram:
    """Ages in seconds; a page counts by its share of a sample."""

    counts: list[float] = field(default_factory=lambda: [0.0] * len(AGE_BOUNDS_S))
    """Not cumulative, by AGE_BOUNDS_S."""
    sum_s: float = 0.0

    def observe(self, ages_s: Sequence[float], num_pages: int) -> None:
        """These ages stand for so many pages."""
        weight = num_pages / len(ages_s)
        for age_s in ages_s:
            self.counts[bisect.bisect_left(AGE_BOUNDS_S, age_s)] += weight
            self.sum_s += weight * age_s


@dataclass(slots=True)
class PoolCounts:
    """Pages, not requests."""

    asked: int = 0
    found: Counter[Tier] = field(default_factory=Counter)
    removed: Counter[tuple[Tier, str]] = field(default_factory=Counter)
    """By tier and reason."""
    removed_bytes: Counter[tuple[Tier, str]] = field(default_factory=Counter)
    replicas_made: int = 0
    replicas_removed: int = 0
    """Further places of blocks that lie elsewhere still."""
    replicas_promoted: int = 0
    """Those that took the stead of a first place that was lost."""
    replica_reads: int = 0
    """Of `found`, pages at further places."""
    evicted_ages: defaultdict[Tier, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    """Time since those evicted had been asked for last."""

    def removal(self, node: Node, reason: str, num_pages: int, size_bytes: int) -> None:
        self.removed[tier_of(node), reason] += num_pages
        self.removed_bytes[tier_of(node), reason] += size_bytes
