"""Free blocks of the paged cache, handed out as consecutive runs where possible.

Attention reads consecutive blocks in place, scattered ones only after copying. A sequence grows by a block every few
steps; the blocks behind it are therefore set aside, and given to others only when nothing else is left.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_FREE, _ASIDE, _USED = 0, 1, 2


class FreeBlocks:
    """Set of free block numbers below `num_blocks`."""

    def __init__(self, num_blocks: int) -> None:
        self._state = np.zeros(num_blocks, dtype=np.uint8)
        self._num_free = num_blocks

    def __len__(self) -> int:
        return self._num_free

    def __contains__(self, block: int) -> bool:
        return bool(self._state[block] != _USED)

    def add(self, block: int) -> None:
        self._state[block] = _FREE
        self._num_free += 1

    def take(self, num_blocks: int, after: int | None, expected_growth: int) -> list[int]:
        """Remove `num_blocks` free blocks, which must exist; the first follows `after` if that one is free."""
        taken: list[int] = []
        if after is not None:
            taken = self._take_following(after, num_blocks)
        while len(taken) < num_blocks:
            taken += self._take_run(num_blocks - len(taken), expected_growth)
        self._set_aside(taken[-1:], expected_growth)
        return taken

    def end_growth(self, block: int) -> None:
        """The sequence that ended with `block` grows no more: nothing is set aside behind it."""
        stop = block + 1
        while stop < len(self._state) and self._state[stop] == _ASIDE:
            stop += 1
        self._state[block + 1 : stop] = _FREE

    def _take_following(self, after: int, num_blocks: int) -> list[int]:
        stop = after + 1
        while stop < len(self._state) and stop - after <= num_blocks and self._state[stop] != _USED:
            stop += 1
        return self._mark(after + 1, stop)

    def _take_run(self, num_blocks: int, expected_growth: int) -> list[int]:
        """From the smallest run that holds blocks and growth, else the largest; set-aside blocks only as a last resort."""
        starts, lengths = _runs(self._state == _FREE)
        if not len(starts):
            starts, lengths = _runs(self._state != _USED)
        fitting = np.flatnonzero(lengths >= num_blocks + expected_growth)
        best = fitting[lengths[fitting].argmin()] if len(fitting) else lengths.argmax()
        start = int(starts[best])
        return self._mark(start, start + min(num_blocks, int(lengths[best])))

    def _mark(self, start: int, stop: int) -> list[int]:
        self._state[start:stop] = _USED
        self._num_free -= stop - start
        return list(range(start, stop))

    def _set_aside(self, last: list[int], expected_growth: int) -> None:
        for block in last:
            following = self._state[block + 1 : block + 1 + expected_growth]
            following[following == _FREE] = _ASIDE


def _runs(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Starts and lengths of the runs of True."""
    edges = np.diff(np.concatenate(([0], mask.view(np.int8), [0])))
    starts = np.flatnonzero(edges == 1)
    return starts, np.flatnonzero(edges == -1) - starts
