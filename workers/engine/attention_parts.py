"""What the rows of a step attend to, and which keys several of them share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from workers.engine.block_table import Run


@dataclass(frozen=True, slots=True)
class AttentionPart:
    """Rows `first_row` .. `first_row + num_rows - 1` of a step: new tokens of one sequence.

    `slots` hold all tokens of the sequence in order, the new ones last.
    """

    first_row: int
    num_rows: int
    slots: tuple[Run, ...]

    @property
    def num_before(self) -> int:
        """Tokens of the sequence before the new ones."""
        return sum(run.length for run in self.slots) - self.num_rows


def split_shared(
    slots: Sequence[Sequence[Run]], multiple_of: int = 1
) -> tuple[list[tuple[list[int], Run]], list[list[Run]]]:
    """Cut the first run that several rows share off each of theirs; the rows and what was cut, and what is left of each.

    What is cut is a multiple of `multiple_of` slots, and leaves at least one slot to every row.
    """
    by_start: defaultdict[int, list[int]] = defaultdict(list)
    for row, own in enumerate(slots):
        by_start[own[0].start].append(row)
    shared, left = [], [list(own) for own in slots]
    for start, rows in by_start.items():
        length = min(slots[row][0].length for row in rows)
        if any(len(slots[row]) == 1 and slots[row][0].length == length for row in rows):
            length -= 1
        length -= length % multiple_of
        if len(rows) < 2 or length == 0:
            continue
        cut = Run(start, length)
        for row in rows:
            first, *others = left[row]
            rest = [Run(cut.stop, first.stop - cut.stop)] if first.stop > cut.stop else []
            left[row] = rest + others
        shared.append((rows, cut))
    return shared, left
