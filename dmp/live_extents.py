"""The extents in use of one segment, packed: by the 64 KiB of the segment that an extent starts in.

Pages of a model are larger than that, so that one row for each 64 KiB holds nearly all of them; what shares its 64 KiB
with another start goes to a table of its own. The rows take 0.02 % of the segment, and memory only where they were used.
Used by `dmp.allocator` only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stratakv.layout import ALIGNMENT_BYTES

GRANULE_BYTES = 64 * 1024
_UNITS_BITS = 4
"""An offset within its granule, in units of 4 KiB."""
EXTENT_BYTES_MAX = ALIGNMENT_BYTES << (32 - _UNITS_BITS)


class LiveExtents:
    """Offset → generation and size; offsets and sizes are multiples of 4 KiB, generations start at 1."""

    def __init__(self, size_bytes: int) -> None:
        rows = -(-size_bytes // GRANULE_BYTES)
        self._generation = np.zeros(rows, np.uint64)
        self._shape = np.zeros(rows, np.uint32)
        """Size in units of 4 KiB, then where in the granule it starts."""
        self._generations = self._generation.data
        self._shapes = self._shape.data
        self._crowded: dict[int, tuple[int, int]] = {}
        """Offset → generation and size, where the granule's row is taken."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def size_bytes(self) -> int:
        """Memory of the rows if all are used."""
        return self._generation.nbytes + self._shape.nbytes

    def add(self, offset: int, generation: int, size_bytes: int) -> None:
        """An extent that was not in use."""
        self._count += 1
        row = offset // GRANULE_BYTES
        if self._generations[row]:
            self._crowded[offset] = (generation, size_bytes)
            return
        units = size_bytes // ALIGNMENT_BYTES
        self._shapes[row] = units << _UNITS_BITS | offset % GRANULE_BYTES // ALIGNMENT_BYTES
        self._generations[row] = generation

    def get(self, offset: int) -> tuple[int, int] | None:
        """Generation and size of the extent that starts there."""
        row, within = divmod(offset, GRANULE_BYTES)
        if not 0 <= row < len(self._shapes):
            return None
        shape = self._shapes[row]
        if self._generations[row] and (shape & (1 << _UNITS_BITS) - 1) * ALIGNMENT_BYTES == within:
            return self._generations[row], (shape >> _UNITS_BITS) * ALIGNMENT_BYTES
        return self._crowded.get(offset)

    def remove(self, offset: int) -> None:
        """The extent that starts there is in use no longer."""
        self._count -= 1
        if self._crowded.pop(offset, None) is None:
            self._generations[offset // GRANULE_BYTES] = 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Offset, generation and size of each."""
        rows = np.flatnonzero(self._generation)
        units = 1 << _UNITS_BITS
        for row, generation, shape in zip(
            rows.tolist(), self._generation[rows].tolist(), self._shape[rows].tolist(), strict=True
        ):
            offset = row * GRANULE_BYTES + shape % units * ALIGNMENT_BYTES
            yield offset, generation, shape // units * ALIGNMENT_BYTES
        for offset, (generation, size_bytes) in self._crowded.items():
            yield offset, generation, size_bytes
