"""Errors inside the daemon.

InvalidRequest
├── ExtentNotLive     the extent is free, or was allocated again since
├── PutRefused        unknown, finished, or of another shape
└── OutOfBounds       a range outside the segment or outside the put
Overloaded
├── SegmentFull
└── DiskFull          no room for a page
Unavailable
└── DiskFailed        the disk cannot be written now
"""

from __future__ import annotations

from stratakv.errors import InvalidRequest, Overloaded, Unavailable


class ExtentNotLive(InvalidRequest):
    """The extent is free already, or was allocated again since."""

    code = "pool_extent_not_live"


class DiskFull(Overloaded):
    """The disk tier has no room for a page."""

    code = "pool_disk_full"


class DiskFailed(Unavailable):
    """The disk refused a write; it is read-only until it takes one again."""

    code = "pool_disk_failed"
