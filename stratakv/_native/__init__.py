"""What Python is too slow for. Moves of KV pages that do not need the interpreter lock: copies with checksums, headers, waiting
for layers, and both ends of the pool protocol. And the walker that follows the messages of SQL sessions, and the table that the
meta server finds blocks in.

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
from stratakv._native.key_table import KeyTable, PythonKeyTable
from stratakv.config import NATIVE_ENV

__all__ = [
    "Ended",
    "Entered",
    "Gate",
    "Grants",
    "HeaderState",
    "KeyTable",
    "LayerMove",
    "Moves",
    "PageHeaders",
    "RangeMove",
    "Wire",
    "is_built",
    "make_gate",
    "make_grants",
    "make_key_table",
    "message_walker",
    "moves",
    "wire",
]


INTERFACE = 5
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


def make_key_table(row_words: int, first_word: int, num_words: int) -> KeyTable:
    """An empty table of rows by their keys."""
    kind = moves.KeyTable if is_built() else PythonKeyTable  # type: ignore[attr-defined]
    return cast(KeyTable, kind(row_words, first_word, num_words))


def is_built() -> bool:
    """Whether the C++ module is in use."""
    return moves is not fallback


def message_walker() -> type[Any] | None:
    """Makes a walker from watched kinds and the class of a violation (`dbnode.sql.walker`); None where it was not built."""
    return cast(type[Any], moves.MessageWalker) if is_built() else None  # type: ignore[attr-defined]


def wire() -> Wire | None:
    """Moves over sockets, where the C++ module is in use."""
    return cast(Wire, moves) if is_built() else None
