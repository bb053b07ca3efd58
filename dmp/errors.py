"""Errors inside the daemon.

InvalidRequest
├── ExtentNotLive     the extent is free, or was allocated again since
├── PutRefused        unknown, finished, or of another shape
└── OutOfBounds       a range outside the segment or outside the put
Overloaded
└── SegmentFull
"""

from __future__ import annotations

from stratakv.errors import InvalidRequest


class ExtentNotLive(InvalidRequest):
    """The extent is free already, or was allocated again since."""

    code = "pool_extent_not_live"
