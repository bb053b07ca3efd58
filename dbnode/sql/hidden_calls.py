"""Which statements may call infer(): those that have the word, or name a view that depends on it. One for each database.

Asked about each message of each session, so it decides by a few scans of the bytes. What it takes for a call and is none costs
a look into the statement; what it misses goes without hints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

TEXT_BYTES_MAX = 32 * 1024
"""Of a message; longer statements are not looked ahead in."""
NAMES_MAX = 200
"""Of a database; no more are learned."""
REFRESH_S = 60.0
"""What was learned is asked for again after so long, before the next statement that may call infer()."""
DATABASES_MAX = 1000
"""That something is remembered of; the oldest is forgotten first."""
_INFER = b"infer"
_CHANGE = re.compile(rb"(?:create|alter|drop)\b", re.IGNORECASE)
_MATERIALIZED = b"materialized"
_IN_WORDS = re.compile(rb"[0-9a-zA-Z_$\x80-\xff]")
# Everything that is no part of a name becomes a space, capitals become small.
_WORDS = bytes(byte if _IN_WORDS.match(bytes((byte,))) else ord(" ") for byte in range(256)).lower()
LEARN = (
    b"""\
WITH RECURSIVE hidden (oid, is_kept) AS (
    SELECT c.oid, c.relkind OPERATOR(pg_catalog.=) 'm'::pg_catalog."char"
    FROM pg_catalog.pg_proc p
    JOIN pg_catalog.pg_depend d ON d.refobjid OPERATOR(pg_catalog.=) p.oid
    JOIN pg_catalog.pg_rewrite r ON r.oid OPERATOR(pg_catalog.=) d.objid
    JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) r.ev_class
    WHERE d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid
      AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_rewrite'::pg_catalog.regclass::pg_catalog.oid
      AND pg_catalog.starts_with(p.proname::pg_catalog.text, 'infer')
      AND p.pronamespace OPERATOR(pg_catalog.=) ANY (ARRAY[
          pg_catalog.to_regnamespace('stratakv'), pg_catalog.to_regnamespace('public')]::pg_catalog.oid[])
    UNION
    SELECT c.oid, c.relkind OPERATOR(pg_catalog.=) 'm'::pg_catalog."char"
    FROM hidden h
    JOIN pg_catalog.pg_depend d ON d.refobjid OPERATOR(pg_catalog.=) h.oid
    JOIN pg_catalog.pg_rewrite r ON r.oid OPERATOR(pg_catalog.=) d.objid
    JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) r.ev_class
    WHERE NOT h.is_kept AND c.oid OPERATOR(pg_catalog.<>) h.oid
      AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass::pg_catalog.oid
      AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_rewrite'::pg_catalog.regclass::pg_catalog.oid)
SELECT pg_catalog.string_agg(n.name, ' ') FILTER (WHERE NOT n.is_kept),
       pg_catalog.string_agg(n.name, ' ') FILTER (WHERE n.is_kept)
FROM (
    SELECT pg_catalog.encode(pg_catalog.convert_to(c.relname::pg_catalog.text, 'UTF8'), 'hex') AS name, h.is_kept
    FROM hidden h JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) h.oid
    LIMIT %d) n"""
    % NAMES_MAX
)
"""Views that depend on infer(), through others too; and materialized ones, which call it when they are refreshed."""


@dataclass(slots=True)
class HiddenCalls:
    """What is known of one database."""

    is_stale: bool = True
    """To be learned before the next statement of any session."""
    learned_s: float = 0.0
    """On the event loop's clock."""
    views: frozenset[str] = frozenset()
    materialized: frozenset[str] = frozenset()
    _words: frozenset[bytes] = frozenset()
    _materialized_words: frozenset[bytes] = frozenset()

    def may_call(self, message: bytes) -> bool:
        """Whether a message with a statement is worth a look."""
        if _INFER in message.lower():
            return True
        if not self._words and not self._materialized_words:
            return False
        words = message[:TEXT_BYTES_MAX].translate(_WORDS).split()
        if not self._words.isdisjoint(words):
            return True
        return _MATERIALIZED in words and not self._materialized_words.isdisjoint(words)

    def learn(self, row: list[str | None], now_s: float) -> None:
        """From the columns that LEARN gives; none if it failed."""
        self.is_stale, self.learned_s = False, now_s
        if len(row) == 2:
            self.views, self.materialized = (_names(column) for column in row)
            self._words, self._materialized_words = _as_words(self.views), _as_words(self.materialized)


def changes_views(message: bytes) -> bool:
    """Whether a statement that may call infer() may make, rename or drop a view."""
    return _CHANGE.search(message) is not None


def _names(column: str | None) -> frozenset[str]:
    return frozenset(bytes.fromhex(name).decode() for name in (column or "").split())


def _as_words(names: Iterable[str]) -> frozenset[bytes]:
    """Without those that are more than one word: they would be found too often."""
    words = (name.encode().translate(_WORDS).split() for name in names)
    return frozenset(word[0] for word in words if len(word) == 1)
