"""Which release this is."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """The installed release, or `0+source` in a tree that was never installed."""
    try:
        return metadata.version("stratakv")
    except metadata.PackageNotFoundError:
        return "0+source"
