"""Whose turn it is: start-time fair queueing between flows, by weight and cost, and priority within a flow. Free of I/O.

Each flow is a tenant. While two wait, what they are given differs, each divided by its weight, by no more than the largest cost of
each divided by its weight (Goyal et al., SIGCOMM 1996); so nobody starves, whatever the others send. Within a flow a low
priority is overtaken OVERTAKEN_MAX times, then it is its turn.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")
FLOWS_KNOWN_MAX = 2048
"""When there are more, those are forgotten in which nobody waits, with what they were given of late."""
_GONE_MAX = 16
OVERTAKEN_MAX = 256
"""By others of the same flow that came later."""


@dataclass(order=True, slots=True)
class Entry(Generic[T]):
    """Somebody who waits; the least of a flow is first."""

    priority: int
    number: int
    cost: float = field(compare=False)
    item: T = field(compare=False)
    flow: int = field(compare=False)
    given_before: int = field(default=0, compare=False)
    """How many of its flow had had their turn when it came."""
    is_waiting: bool = field(default=True, compare=False)


@dataclass(slots=True)
class _Flow(Generic[T]):
    weight: int
    entries: list[Entry[T]] = field(default_factory=list)
    """A heap; those that have gone stay until they are come across, or are too many."""
    by_arrival: deque[Entry[T]] = field(default_factory=deque)
    """The same ones."""
    num_waiting: int = 0
    num_given: int = 0
    """How many have had their turn."""
    finish: float = 0.0
    """Virtual time at which what it was given would be done."""
    credit: float = 0.0
    """What it took less than was estimated."""
    start: float = 0.0
    """When its next one begins, if it is in turn."""
    turn: int | None = None
    """Number of its place in the heap of turns, if it has one; others there are void."""


class FairQueue(Generic[T]):
    """Entries of many flows. The caller bounds how many."""

    def __init__(self) -> None:
        self._flows: dict[int, _Flow[T]] = {}
        self._turns: list[tuple[float, int, int]] = []
        """A heap of (start, number, flow): each flow in which somebody waits, and void ones."""
        self._numbers = count()
        self._virtual = 0.0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def num_waiting(self, flow: int) -> int:
        """In one flow."""
        found = self._flows.get(flow)
        return found.num_waiting if found is not None else 0

    def push(self, flow: int, weight: int, cost: float, priority: int, item: T) -> Entry[T]:
        """Let somebody wait."""
        mine = self._flow(flow, weight)
        entry = Entry(priority, next(self._numbers), cost, item, flow, mine.num_given)
        heapq.heappush(mine.entries, entry)
        mine.by_arrival.append(entry)
        mine.num_waiting += 1
        self._num_waiting += 1
        if mine.turn is None:
            self._queue_turn(flow, mine)
        return entry

    def pop(self) -> T | None:
        """Whose turn it is."""
        while self._turns:
            start, number, flow = heapq.heappop(self._turns)
            mine = self._flows.get(flow)
            if mine is None or mine.turn != number:
                continue
            mine.turn = None
            entry = _next_of(mine)
            if entry is None:
                continue
            entry.is_waiting = False
            mine.num_given += 1
            mine.num_waiting -= 1
            self._num_waiting -= 1
            self._virtual = max(self._virtual, start)
            mine.finish = start + entry.cost / mine.weight
            if mine.num_waiting:
                self._queue_turn(flow, mine)
            return entry.item
        return None

    def pass_by(self, flow: int, weight: int, cost: float) -> None:
        """Somebody is let in without waiting, because nobody waits."""
        mine = self._flow(flow, weight)
        self._virtual = self._start(mine)
        mine.finish = self._virtual + cost / weight

    def correct(self, flow: int, cost: float) -> None:
        """Somebody took so much less than was estimated."""
        mine = self._flows.get(flow)
        if mine is None:
            return
        if mine.turn is None:
            mine.credit += cost / mine.weight
            return
        mine.finish = mine.start - cost / mine.weight
        self._queue_turn(flow, mine)
        if len(self._turns) > 2 * len(self._flows) + _GONE_MAX:
            self._turns = [turn for turn in self._turns if self._is_valid(turn)]
            heapq.heapify(self._turns)

    def remove(self, entry: Entry[T]) -> None:
        """It no longer waits; it must not have been popped."""
        mine = self._flows[entry.flow]
        entry.is_waiting = False
        mine.num_waiting -= 1
        self._num_waiting -= 1
        if len(mine.entries) > 2 * mine.num_waiting + _GONE_MAX:
            mine.entries = [one for one in mine.entries if one.is_waiting]
            heapq.heapify(mine.entries)
            mine.by_arrival = deque(one for one in mine.by_arrival if one.is_waiting)

    def make_room(self, flow: int, weight: int) -> T | None:
        """Takes the last one out of the flow that has most waiting for its weight; None if that would still be this one."""
        most = max(self._flows.values(), key=lambda one: one.num_waiting / one.weight, default=None)
        if most is None or most.num_waiting / most.weight <= (self.num_waiting(flow) + 1) / weight:
            return None
        last = max(entry for entry in most.entries if entry.is_waiting)
        self.remove(last)
        return last.item

    def _flow(self, flow: int, weight: int) -> _Flow[T]:
        found = self._flows.get(flow)
        if found is None:
            if len(self._flows) >= FLOWS_KNOWN_MAX:
                self._flows = {number: one for number, one in self._flows.items() if one.turn is not None}
            found = self._flows[flow] = _Flow(weight)
        found.weight = weight
        return found

    def _start(self, mine: _Flow[T]) -> float:
        start = max(self._virtual, mine.finish - mine.credit)
        mine.credit = 0.0
        return start

    def _queue_turn(self, flow: int, mine: _Flow[T]) -> None:
        mine.start, mine.turn = self._start(mine), next(self._numbers)
        heapq.heappush(self._turns, (mine.start, mine.turn, flow))

    def _is_valid(self, turn: tuple[float, int, int]) -> bool:
        mine = self._flows.get(turn[2])
        return mine is not None and mine.turn == turn[1]


def _next_of(mine: _Flow[T]) -> Entry[T] | None:
    """The one of lowest priority number, unless the oldest has been overtaken too often."""
    while mine.by_arrival and not mine.by_arrival[0].is_waiting:
        mine.by_arrival.popleft()
    if not mine.by_arrival:
        mine.entries.clear()
        return None
    oldest = mine.by_arrival[0]
    if mine.num_given - oldest.given_before >= OVERTAKEN_MAX:
        mine.entries.remove(oldest)
        heapq.heapify(mine.entries)
        return oldest
    while not mine.entries[0].is_waiting:
        heapq.heappop(mine.entries)
    return heapq.heappop(mine.entries)
