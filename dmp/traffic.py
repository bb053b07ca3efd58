"""What the connections of a daemon have moved: counted by each connection's own thread, added up when somebody asks."""

from __future__ import annotations

import enum

import numpy as np

from stratakv._native.base import Int64s


class Flow(enum.IntEnum):
    """Where bytes went over TCP. The first two are also counted by `serve_frames`."""

    READ = 0
    WRITTEN = 1
    READ_FROM_DISK = 2


class Amount(enum.IntEnum):
    """What is counted of each flow."""

    RANGES = 0
    BYTES = 1
    NANOSECONDS = 2


def no_traffic() -> Int64s:
    """Zeros, [flow][amount]."""
    return np.zeros((len(Flow), len(Amount)), dtype=np.int64)


def count(traffic: Int64s, flow: Flow, num_ranges: int, size_bytes: int, seconds: float) -> None:
    """One frame has been moved."""
    traffic[flow] += (num_ranges, size_bytes, round(seconds * 1e9))
