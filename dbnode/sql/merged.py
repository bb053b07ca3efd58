"""What a MERGE reads, as a SELECT: its source joined to its target, with the values of the first branch that fits. Free of I/O."""

from __future__ import annotations

from collections.abc import Iterator

from sqlglot import Token, TokenType

from dbnode.sql.token_lists import clauses_of, split, top_level, written


def merged(text: str, tokens: list[Token]) -> str | None:
    """`tokens` follow the word MERGE. None if it is not understood."""
    starts = [position for position in top_level(tokens) if _is_branch(tokens, position)]
    if not starts:
        return None
    _, head = clauses_of(tokens[: starts[0]], ("INTO", "USING", "ON"))
    target, source, condition = (head.get(word) for word in ("INTO", "USING", "ON"))
    if not target or not source or not condition or target[-1].token_type is TokenType.STAR:
        return None
    row = f"{written(text, target[-1:])}.ctid"
    ends = [*starts[1:], len(tokens)]
    arms = [_arm(text, tokens[start + 1 : end], row) for start, end in zip(starts, ends, strict=True)]
    if None in arms:
        return None
    join = f"{written(text, source)} LEFT JOIN {written(text, target)} ON {written(text, condition)}"
    return f"SELECT CASE {' '.join(filter(None, arms))} END FROM {join}"


def _is_branch(tokens: list[Token], position: int) -> bool:
    words = [token.text.upper() for token in tokens[position : position + 3]]
    return words[:2] == ["WHEN", "MATCHED"] or words == ["WHEN", "NOT", "MATCHED"]


def _arm(text: str, tokens: list[Token], row: str) -> str | None:
    """[NOT] MATCHED [BY TARGET] [AND condition] THEN action"""
    then = next((position for position in _outside_case(tokens) if tokens[position].text.upper() == "THEN"), None)
    if then is None:
        return None
    is_matched = tokens[0].text.upper() == "MATCHED"
    when = tokens[1 if is_matched else 2 : then]
    words = [token.text.upper() for token in when[:2]]
    if words == ["BY", "TARGET"]:
        when = when[2:]
    elif words[:1] == ["BY"]:
        return None
    condition = f"{row} IS {'NOT ' if is_matched else ''}NULL"
    if when:
        condition += f" AND ({written(text, when[1:])})"
    values = _values(text, tokens[then + 1 :])
    return f"WHEN {condition} THEN CAST(ROW({', '.join(values)}) AS text)" if values else f"WHEN {condition} THEN NULL"


def _outside_case(tokens: list[Token]) -> Iterator[int]:
    depth = 0
    for position in top_level(tokens):
        kind = tokens[position].token_type
        depth += (kind is TokenType.CASE) - (kind is TokenType.END)
        if depth == 0:
            yield position


def _values(text: str, action: list[Token]) -> list[str]:
    """What the row is made of."""
    _, clauses = clauses_of(action, ("SET", "VALUES", "RETURNING"))
    if "SET" in clauses:
        values = [_assigned(assignment) for assignment in split(clauses["SET"], _is_comma)]
    else:
        values = split(clauses.get("VALUES", [])[1:-1], _is_comma)
    return [written(text, value) for value in values if value and value[0].text.upper() != "DEFAULT"]


def _assigned(assignment: list[Token]) -> list[Token]:
    target = split(assignment, lambda token: token.token_type is TokenType.EQ)[0]
    return assignment[len(target) + 1 :]


def _is_comma(token: Token) -> bool:
    return token.token_type is TokenType.COMMA
