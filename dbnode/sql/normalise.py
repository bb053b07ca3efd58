"""A statement without its literals, as statistics show it: constants become $n, space and comments go. Free of I/O."""

from __future__ import annotations

from functools import lru_cache

from dbnode.sql.lexer import SqlToken, TokenKind, UnreadableSql, tokenize

TEXT_CHARS_MAX = 32 * 1024
"""A longer statement is not shown at all."""
SHOWN_CHARS_MAX = 2048
"""What is left of one is cut here."""
_CACHED_MAX = 256


@lru_cache(maxsize=_CACHED_MAX)
def normalised(text: str, owner: str = "") -> str | None:
    """None for what is too long, or cannot be read without doubt. What is remembered is each `owner`'s."""
    del owner  # part of the key only: how long it takes must not tell that another role has sent the same text
    if len(text) > TEXT_CHARS_MAX:
        return None
    try:
        tokens = list(tokenize(text))
    except UnreadableSql:
        return None
    while tokens and text[tokens[-1].start] == ";":
        tokens.pop()
    shown = "".join(_pieces(text, tokens))
    return shown if len(shown) <= SHOWN_CHARS_MAX else shown[: SHOWN_CHARS_MAX - 1] + "…"


def _pieces(text: str, tokens: list[SqlToken]) -> list[str]:
    number = max((int(text[t.start + 1 : t.end]) for t in tokens if t.kind is TokenKind.PARAMETER), default=0)
    pieces: list[str] = []
    end = 0
    for token in tokens:
        if pieces and token.start > end:
            pieces.append(" ")
        if token.kind is TokenKind.LITERAL:
            number += 1
            pieces.append(f"${number}")
        else:
            pieces.append(text[token.start : token.end])
        end = token.end
    return pieces
