"""Lists of a statement's tokens, cut at keywords and separators outside parentheses. Used by what reads statements. Free of I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sqlglot import Token, TokenType

_QUOTED = (TokenType.IDENTIFIER, TokenType.STRING)


def top_level(tokens: list[Token]) -> Iterator[int]:
    """Positions outside parentheses, those of opening ones included."""
    depth = 0
    for position, token in enumerate(tokens):
        if depth == 0:
            yield position
        if token.token_type is TokenType.L_PAREN:
            depth += 1
        elif token.token_type is TokenType.R_PAREN:
            depth -= 1


def clauses_of(tokens: list[Token], words: tuple[str, ...]) -> tuple[list[Token], dict[str, list[Token]]]:
    """What stands before the first of the keywords, and what follows each, outside parentheses."""
    starts = [
        position
        for position in top_level(tokens)
        if tokens[position].text.upper() in words and tokens[position].token_type not in _QUOTED
    ]
    ends = [*starts[1:], len(tokens)] if starts else []
    clauses = {tokens[a].text.upper(): tokens[a + 1 : b] for a, b in zip(starts, ends, strict=True)}
    return tokens[: starts[0]] if starts else tokens, clauses


def split(tokens: list[Token], is_separator: Callable[[Token], bool]) -> list[list[Token]]:
    """Parts between separators outside parentheses."""
    separators = [position for position in top_level(tokens) if is_separator(tokens[position])]
    starts, ends = [0, *(position + 1 for position in separators)], [*separators, len(tokens)]
    return [tokens[a:b] for a, b in zip(starts, ends, strict=True)]


def written(text: str, tokens: list[Token]) -> str:
    """As it was written; empty for no tokens."""
    return text[tokens[0].start : tokens[-1].end + 1] if tokens else ""
