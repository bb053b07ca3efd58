"""Statements whose rows are fetched in parts: DECLARE and FETCH, and portals that Execute suspends. Free of I/O.

Used by `Lookahead`. Each part that is asked for may look ahead a little further than the one before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from dbnode.sql.client_batch import Batch
from dbnode.sql.memo import Hint
from dbnode.sql.statements import Collectable

CURSORS_MAX = 64
"""Open cursors of a transaction that are followed; the oldest are forgotten first."""
FETCHING = re.compile(rb"fetch", re.IGNORECASE)
_NAME = r'(?P<name>"(?:[^"]|"")+"|[^\W\d][\w$]*)'
_DECLARE = re.compile(
    rf"\s*DECLARE\s+{_NAME}\s+(?:(?:BINARY|ASENSITIVE|INSENSITIVE|NO|SCROLL)\s+)*CURSOR\s+"
    r"(?P<hold>WITH\s+HOLD\s+|WITHOUT\s+HOLD\s+)?FOR\s+(?P<query>.*)",
    re.IGNORECASE | re.DOTALL,
)
_FETCH = re.compile(
    rf"\s*FETCH\s+(?:(?:NEXT|FORWARD)\s+)?(?:(?P<rows>\d+|ALL)\s+)?(?:(?:FROM|IN)\s+)?{_NAME}\s*;?\s*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Declared:
    """DECLARE name CURSOR FOR query."""

    name: str
    query: str
    is_held: bool
    """All its rows are computed when the transaction commits."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """FETCH forward."""

    name: str
    num_rows: int | None
    """None for all."""


def declared(text: str) -> Declared | None:
    found = _DECLARE.fullmatch(text)
    if found is None:
        return None
    is_held = (found["hold"] or "").upper().startswith("WITH ")
    return Declared(_folded(found["name"]), found["query"], is_held)


def fetched(text: str) -> Fetched | None:
    found = _FETCH.fullmatch(text)
    if found is None:
        return None
    rows = found["rows"] or "1"
    return Fetched(_folded(found["name"]), None if rows.upper() == "ALL" else int(rows))


def _folded(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name.lower()


@dataclass(slots=True)
class OpenCursor:
    """One whose query calls infer(), and how far it has been looked ahead in."""

    batch: Batch
    target: Collectable
    window: int
    """New prompts of its next pass."""
    found: list[Hint] = field(default_factory=list)
    """By earlier passes, and perhaps not asked for yet."""
    is_exhausted: bool = False
    """The last pass found nothing new."""

    @property
    def num_levels(self) -> int:
        """Passes after which a row is known whole: calls may depend on one another."""
        return max(1, self.target.select.lower().count("infer"))

    def needs_more(self, num_rows: int | None) -> bool:
        """Whether to look further ahead before so many rows are fetched; None for all."""
        if self.is_exhausted:
            return False
        num_ahead = sum(not hint.is_consumed for hint in self.found)
        return num_rows is None or num_ahead <= self.num_levels * max(num_rows, self.window // 4)

    def looked(self, found: Iterable[Hint], *, is_exhausted: bool) -> None:
        """After its passes."""
        self.found = [hint for hint in self.found if not hint.is_consumed]
        self.found += found
        self.is_exhausted = is_exhausted
        self.window *= 2


class OpenCursors:
    """Of one session's transaction, by name; portals of the protocol are cursors too."""

    def __init__(self) -> None:
        self._by_name: dict[str, OpenCursor] = {}

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def get(self, name: str) -> OpenCursor | None:
        return self._by_name.get(name)

    def put(self, name: str, cursor: OpenCursor) -> None:
        self._by_name.pop(name, None)
        self._by_name[name] = cursor
        if len(self._by_name) > CURSORS_MAX:
            del self._by_name[next(iter(self._by_name))]

    def clear(self) -> None:
        self._by_name.clear()
