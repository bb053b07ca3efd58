"""What the index tells of many pages at once: arrays with one element each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meta_server.copies import Heirs
from meta_server.slots import SlotArray

ExtentArray = NDArray[np.int64]
"""[pages, 2]: offset and generation."""


@dataclass(frozen=True, slots=True)
class Removed:
    """Pages that left the index."""

    slots: SlotArray
    segments: NDArray[np.int32]
    extents: ExtentArray
    page_bytes: NDArray[np.int64]
    pinned: NDArray[np.bool_]
    num_copies: int
    """Those that were not the first places of their blocks."""
    heirs: Heirs
    """Of the others, where their blocks lie further on."""

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class History:
    """How pages were used."""

    ticks: NDArray[np.int64]
    reads: NDArray[np.uint8]
