"""PostgreSQL's tokens: enough to tell words from literals and comments in any statement. Free of I/O.

Stricter than a parser has to be: where the text could be read in two ways, it is not read at all, so that nothing that may be
a literal is ever taken for a word. https://www.postgresql.org/docs/current/sql-syntax-lexical.html
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass


class TokenKind(enum.Enum):
    """What a piece of a statement is."""

    WORD = enum.auto()
    """A keyword or a name without quotes."""
    QUOTED = enum.auto()
    """A name in double quotes."""
    LITERAL = enum.auto()
    """A string of any kind, or a number."""
    PARAMETER = enum.auto()
    SYMBOL = enum.auto()


@dataclass(frozen=True, slots=True)
class SqlToken:
    """One piece, with its place in the text."""

    kind: TokenKind
    start: int
    end: int


class UnreadableSql(ValueError):
    """A quote that is not closed, or a backslash whose meaning depends on the session."""


_SPACE = re.compile(r"\s+|--[^\n\r]*")
_WORD = re.compile(r"[^\W\d][\w$]*")
_NUMBER = re.compile(
    r"(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d[\d_]*)?)\w*"
)
_PARAMETER = re.compile(r"\$\d{1,9}")
_DOLLAR = re.compile(r"\$(?:[^\W\d]\w*)?\$")
_QUOTED = re.compile(r'(?:[uU]&)?"(?:[^"]|"")*"')
_STRING = re.compile(r"(?:[bBxXnN]|[uU]&)?'(?:[^']|'')*'")
_ESCAPED = re.compile(r"[eE]'(?:[^'\\]|''|\\.)*'", re.DOTALL)


def tokenize(text: str) -> Iterator[SqlToken]:
    """Tokens in order, without space and comments. Raises UnreadableSql."""
    position = 0
    while position < len(text):
        if match := _SPACE.match(text, position):
            position = match.end()
        elif text.startswith("/*", position):
            position = _comment_end(text, position)
        else:
            token = _token(text, position)
            yield token
            position = token.end


def _token(text: str, start: int) -> SqlToken:
    for pattern, kind in ((_ESCAPED, TokenKind.LITERAL), (_STRING, TokenKind.LITERAL), (_QUOTED, TokenKind.QUOTED)):
        if match := pattern.match(text, start):
            if pattern is _STRING and "\\" in match[0]:
                # what ends it depends on standard_conforming_strings
                raise UnreadableSql("a backslash in an ordinary string")
            return SqlToken(kind, start, match.end())
    character = text[start]
    if character in "'\"":
        raise UnreadableSql("a quote is not closed")
    if match := _PARAMETER.match(text, start):
        return SqlToken(TokenKind.PARAMETER, start, match.end())
    if match := _DOLLAR.match(text, start):
        end = text.find(match[0], match.end())
        if end < 0:
            raise UnreadableSql("a dollar quote is not closed")
        return SqlToken(TokenKind.LITERAL, start, end + len(match[0]))
    if match := _WORD.match(text, start):
        if text[match.end() : match.end() + 1] == "'" and match[0].lower() in ("e", "b", "x", "n"):
            raise UnreadableSql("a quote is not closed")
        return SqlToken(TokenKind.WORD, start, match.end())
    if (character.isdigit() or character == ".") and (match := _NUMBER.match(text, start)):
        return SqlToken(TokenKind.LITERAL, start, match.end())
    return SqlToken(TokenKind.SYMBOL, start, start + 1)


def _comment_end(text: str, start: int) -> int:
    """Comments nest."""
    depth, position = 0, start
    while position < len(text):
        if text.startswith("/*", position):
            depth, position = depth + 1, position + 2
        elif text.startswith("*/", position):
            depth, position = depth - 1, position + 2
            if depth == 0:
                return position
        else:
            position += 1
    raise UnreadableSql("a comment is not closed")
