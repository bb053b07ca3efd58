"""Which order of its fields lets each row's prompt share the longest beginning with other rows' prompts. Free of I/O.

Greedy group recursion after Liu et al., "Optimizing LLM Queries in Relational Data Analytics Workloads" (MLSys 2025): take the
field that saves most where its rows stand together, put it first in these rows along with all that they have in common
besides, go on within them and with the others. Unbounded in depth, bounded in time. Called by `hints`, which sorts the prompts.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

Field: TypeAlias = tuple[str, str]
"""Name and value."""
Fields: TypeAlias = tuple[Field, ...]

_CLOCK_EVERY = 64
"""Steps between looks at the clock."""
_NEIGHBOURS_MAX = 1000
"""Values of a field that are compared to find out how alike they begin."""


def line(item: Field) -> str:
    """A field as a prompt has it."""
    return f"{item[0]}: {item[1]}"


def order_fields(rows: Sequence[Fields], budget_s: float, clock: Callable[[], float] = time.monotonic) -> list[Fields]:
    """Each row with its own fields, reordered; the rows stay in order. A row has no name twice.

    When the time is over, what is left takes its fields in one order for all, those first that repeat most. Never saves less
    than the fields as written do.
    """
    table = _Table.of(rows)
    grouped = _Grouping(table, clock() + budget_s, clock).run()
    by_gain = [tuple(sorted(row, key=table.rank_by_gain.__getitem__)) for row in table.rows]
    best = max((grouped, by_gain, table.rows), key=table.saved_chars)
    return [tuple(table.fields[cell] for cell in row) for row in best]


@dataclass(frozen=True, slots=True)
class _Table:
    """Rows as numbers: equal fields have the same one."""

    fields: list[Field]
    rows: list[tuple[int, ...]]
    lengths: list[int]
    """Characters of each field's line."""
    rank_by_gain: list[int]
    """Of each field: the place of its name when those come first that repeat most."""
    rank_by_text: list[int]
    """Of each field: the place of its name when those come first whose values begin most alike."""

    @classmethod
    def of(cls, rows: Sequence[Fields]) -> _Table:
        numbers: dict[Field, int] = {}
        numbered = [tuple([numbers.setdefault(item, len(numbers)) for item in row]) for row in rows]
        fields = list(numbers)
        lengths = [len(name) + len(value) + 3 for name, value in fields]
        counts = Counter(cell for row in numbered for cell in row)
        gains: Counter[str] = Counter()
        for cell, count in counts.items():
            gains[fields[cell][0]] += (count - 1) * lengths[cell]
        by_gain = _ranks(gains.keys(), gains.__getitem__)
        by_text = _ranks(gains.keys(), _alikeness(fields).__getitem__)
        return cls(fields, numbered, lengths, [by_gain[f[0]] for f in fields], [by_text[f[0]] for f in fields])

    def saved_chars(self, rows: Iterable[tuple[int, ...]]) -> int:
        """Characters of leading fields equal to those of the row before, when the rows stand in the best order."""
        saved = 0
        for one, other in pairwise(sorted(rows)):
            for cell, same in zip(one, other, strict=False):
                if cell != same:
                    break
                saved += self.lengths[cell]
        return saved


def _ranks(names: Iterable[str], worth: Callable[[str], float]) -> dict[str, int]:
    return {name: rank for rank, name in enumerate(sorted(names, key=lambda name: (-worth(name), name)))}


def _alikeness(fields: Iterable[Field]) -> dict[str, float]:
    """For each name, how many characters neighbours in the sorted lines have in common."""
    values: dict[str, list[str]] = defaultdict(list)
    for name, value in fields:
        values[name].append(value)
    return {name: len(name) + 2 + _common_chars(sorted(found)) for name, found in values.items()}


def _common_chars(ordered: list[str]) -> float:
    sample = ordered[:: len(ordered) // _NEIGHBOURS_MAX + 1]
    common = sum(_common_length(one, other) for one, other in pairwise(sample))
    return common / max(1, len(sample) - 1)


def _common_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _TimeOver(Exception):
    """The budget is used up."""


@dataclass(slots=True)
class _Grouping:
    """The recursion; rows move from `left` to `placed`, field by field."""

    table: _Table
    deadline_s: float
    clock: Callable[[], float]
    left: list[frozenset[int]] = field(init=False)
    """Of each row, the fields that have no place yet."""
    placed: list[list[int]] = field(init=False)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.left = [frozenset(row) for row in self.table.rows]
        self.placed = [[] for _ in self.table.rows]

    def run(self) -> list[tuple[int, ...]]:
        """All rows."""
        waiting = [list(range(len(self.left)))]
        rank = self.table.rank_by_text
        try:
            while waiting:
                waiting += self._split(waiting.pop())
        except _TimeOver:
            rank = self.table.rank_by_gain
        return [
            (*placed, *sorted(left, key=rank.__getitem__)) for placed, left in zip(self.placed, self.left, strict=True)
        ]

    def _split(self, rows: list[int]) -> list[list[int]]:
        """Groups of rows that have a further field in common; these fields get their place. Raises _TimeOver."""
        members: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            for cell in self.left[row]:
                members[cell].append(row)
        heap = [
            (-self._gain(self._common(found), len(found)), cell) for cell, found in members.items() if len(found) > 1
        ]
        heapq.heapify(heap)
        free, groups = set(rows), []
        while heap:
            _, cell = heapq.heappop(heap)
            group = [row for row in members[cell] if row in free]
            if len(group) < 2:
                continue
            common = self._common(group)
            gain = self._gain(common, len(group))
            if len(group) < len(members[cell]) and heap and gain < -heap[0][0]:
                members[cell] = group  # others took rows of it, and now another one is worth more
                heapq.heappush(heap, (-gain, cell))
                continue
            self._place(group, common)
            free.difference_update(group)
            groups.append(group)
        return groups

    def _common(self, rows: list[int]) -> frozenset[int]:
        """Fields without a place that all of them have. Raises _TimeOver."""
        self.num_steps += 1
        if self.num_steps % _CLOCK_EVERY == 0 and self.clock() >= self.deadline_s:
            raise _TimeOver
        common = self.left[rows[0]]
        for row in rows:
            common &= self.left[row]
            if len(common) == 1:
                break
        return common

    def _gain(self, common: frozenset[int], num_rows: int) -> float:
        """Characters saved in each row when so many begin with these fields.

        Not in all rows together, as published: many rows with a short field in common would come first, and tear those apart
        that have a long one.
        """
        return sum(self.table.lengths[cell] for cell in common) * (num_rows - 1) / (num_rows + 1)

    def _place(self, rows: list[int], common: frozenset[int]) -> None:
        ordered = sorted(common, key=self.table.rank_by_text.__getitem__)
        for row in rows:
            self.placed[row] += ordered
            self.left[row] -= common
