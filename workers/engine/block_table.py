"""Where a sequence's tokens lie in the paged cache, kept as runs of consecutive blocks so that they can be read in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive slots of the paged cache; slot = block × block_size + offset."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


def cut_runs(runs: Sequence[Run], num_slots: int) -> list[Run]:
    """The first `num_slots` slots of `runs`."""
    cut, left = [], num_slots
    for run in runs:
        if left <= 0:
            break
        cut.append(Run(run.start, min(run.length, left)))
        left -= run.length
    return cut


class BlockTable:
    """L1 blocks of one sequence, in order of their tokens."""

    __slots__ = ("_block_size", "_runs", "blocks")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.blocks: list[int] = []
        self._runs: list[Run] = []
        """Runs of blocks, not of slots."""

    @property
    def num_slots(self) -> int:
        return len(self.blocks) * self._block_size

    def extend(self, blocks: Sequence[int]) -> None:
        self.blocks.extend(blocks)
        for block in blocks:
            if self._runs and self._runs[-1].stop == block:
                last = self._runs[-1]
                self._runs[-1] = Run(last.start, last.length + 1)
            else:
                self._runs.append(Run(block, 1))

    def take_from(self, first: int) -> list[int]:
        """Remove and return the blocks from index `first` on."""
        removed, kept = self.blocks[first:], self.blocks[:first]
        self.blocks, self._runs = [], []
        self.extend(kept)
        return removed

    def slot_runs(self, start: int, stop: int) -> list[Run]:
        """Slots of the tokens `start` .. `stop - 1`."""
        runs, at = [], 0
        for run in self._runs:
            length = run.length * self._block_size
            first, last = max(start, at), min(stop, at + length)
            if first < last:
                runs.append(Run(run.start * self._block_size + first - at, last - first))
            at += length
        return runs
