"""EXPLAIN: which statement it is for, and whether it runs it. Free of I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

import sqlglot
from sqlglot import TokenType
from sqlglot.errors import SqlglotError

from dbnode.sql.token_lists import split, top_level

_EXPLAIN = re.compile(r"(?:\s+|--[^\n]*(?:\n|$)|/\*(?:[^*]|\*(?!/))*\*/)*explain\b", re.IGNORECASE)
_QUERY_STARTS = (TokenType.SELECT, TokenType.WITH, TokenType.VALUES, TokenType.L_PAREN)
_WORDS = ("ANALYZE", "ANALYSE", "VERBOSE")
_ANALYZE = ("ANALYZE", "ANALYSE")
_OFF = ("OFF", "FALSE", "0")


@dataclass(frozen=True, slots=True)
class Explained:
    """What follows the options of EXPLAIN."""

    statement: str
    is_run: bool
    """With ANALYZE; else it is only planned."""


def explained(text: str) -> Explained | None:
    """None if the text is no EXPLAIN of one statement."""
    start = _EXPLAIN.match(text)
    if start is None:
        return None
    rest = text[start.end() :]
    try:
        tokens = sqlglot.tokenize(rest, dialect="postgres")
    except (SqlglotError, RecursionError):
        return None
    while tokens and tokens[-1].token_type is TokenType.SEMICOLON:
        tokens.pop()
    if not tokens or any(token.token_type is TokenType.SEMICOLON for token in tokens):
        return None
    position, is_run = 0, False
    if tokens[0].token_type is TokenType.L_PAREN and len(tokens) > 1 and tokens[1].token_type not in _QUERY_STARTS:
        outside = list(top_level(tokens))
        position = outside[1] if len(outside) > 1 else len(tokens)
        for option in split(tokens[1 : position - 1], lambda token: token.token_type is TokenType.COMMA):
            words = [token.text.upper() for token in option]
            if words and words[0] in _ANALYZE:
                is_run = words[-1] not in _OFF
    else:
        while position < len(tokens) and tokens[position].text.upper() in _WORDS:
            is_run |= tokens[position].text.upper() in _ANALYZE
            position += 1
    return Explained(rest[tokens[position].start :], is_run) if position < len(tokens) else None
