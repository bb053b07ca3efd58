"""Moves of KV pages that do not need the interpreter lock: copies with checksums, headers, and waiting for layers.

`moves` is the C++ module where it was built, else the Python one, which does the same, slower, and in step with whatever else
Python does. `STRATAKV_NATIVE=0` chooses the Python one. Used by `stratakv.pool` and the workers' tiers.
"""

from __future__ import annotations

import os
from typing import cast

from stratakv._native import fallback
from stratakv._native.base import Ended, Gate, HeaderState, LayerMove, Moves, RangeMove, Wire
from stratakv.config import NATIVE_ENV

__all__ = [
    "Ended",
    "Gate",
    "HeaderState",
    "LayerMove",
    "Moves",
    "RangeMove",
    "Wire",
    "is_built",
    "make_gate",
    "moves",
    "wire",
]


def _load() -> Moves:
    """The C++ module, or the Python one if it is asked for or the other was not built."""
    if os.environ.get(NATIVE_ENV) != "0":
        try:
            from stratakv._native import _moves
        except ImportError:
            return fallback
        return cast(Moves, _moves)
    return fallback


moves = _load()


def make_gate() -> Gate:
    """A gate for the functions of `moves`."""
    return moves.Gate()


def is_built() -> bool:
    """Whether the C++ module is in use."""
    return moves is not fallback


def wire() -> Wire | None:
    """Moves over sockets, where the C++ module is in use."""
    return cast(Wire, moves) if is_built() else None
