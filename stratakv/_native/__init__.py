"""What Python is too slow for. Moves of KV pages that do not need the interpreter lock: copies with checksums, headers, waiting
for layers, and both ends of the pool protocol. And the walker that follows the messages of SQL sessions.

`moves` is the C++ module where it was built, else the Python one, which does the same, slower, and in step with whatever else
Python does. `STRATAKV_NATIVE=0` chooses the Python one. Used by `stratakv.pool` and the workers' tiers.
"""

from __future__ import annotations

import os
from typing import Any, cast

from stratakv._native import fallback
from stratakv._native.base import (
    Ended,
    Entered,
    Gate,
    Grants,
    HeaderState,
    LayerMove,
    Moves,
    PageHeaders,
    RangeMove,
    Wire,
)
from stratakv.config import NATIVE_ENV

__all__ = [
    "Ended",
    "Entered",
    "Gate",
    "Grants",
    "HeaderState",
    "LayerMove",
    "Moves",
    "PageHeaders",
    "RangeMove",
    "Wire",
    "is_built",
    "make_gate",
    "make_grants",
    "message_walker",
    "moves",
    "wire",
]


INTERFACE = 3
"""Counted up with every change of what the C++ module offers: one that was built from older sources is not used."""


def _load() -> Moves:
    """The C++ module, or the Python one if it is asked for or the other was not built from these sources."""
    if os.environ.get(NATIVE_ENV) != "0":
        try:
            from stratakv._native import _moves
        except ImportError:
            return fallback
        if getattr(_moves, "INTERFACE", 0) == INTERFACE:
            return cast(Moves, _moves)
    return fallback


moves = _load()


def make_gate() -> Gate:
    """A gate for the functions of `moves`."""
    return moves.Gate()


def make_grants() -> Grants:
    """A table of grants for the functions of `moves`."""
    return moves.Grants()


def is_built() -> bool:
    """Whether the C++ module is in use."""
    return moves is not fallback


def message_walker() -> type[Any] | None:
    """Makes a walker from watched kinds and the class of a violation (`dbnode.sql.walker`); None where it was not built."""
    return cast(type[Any], moves.MessageWalker) if is_built() else None  # type: ignore[attr-defined]


def wire() -> Wire | None:
    """Moves over sockets, where the C++ module is in use."""
    return cast(Wire, moves) if is_built() else None
