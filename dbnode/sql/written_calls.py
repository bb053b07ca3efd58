"""Calls of infer() and its kin as they stand in a statement's text, before it is parsed. Free of I/O; for speed only.

Each gets a number, which goes with the call two ways: among its options, so that the listener knows which call it is asked for,
and as its name, so that `dbnode.sql.call_sites` finds it in the parsed statement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlglot import Token, TokenType, exp

SITE_OPTION = "@site"
"""Name of the option that carries the number; taken off before the call means anything."""
UNNUMBERED = 0
"""Stands for all calls that carry no number: in views and functions, and of functions without options."""
SITES_MAX = 64
_MARK = "stratakv_site_"
_PREFIX = "infer"
_OPTIONS_POSITION = {"infer": 2, "infer_bool": 2, "infer_json": 3, "infer_choice": 3, "infer_row": 3}
_QUALIFIERS = ("stratakv", "public")
_OPENING = (TokenType.L_PAREN, TokenType.L_BRACKET, TokenType.L_BRACE)
_CLOSING = (TokenType.R_PAREN, TokenType.R_BRACKET, TokenType.R_BRACE)
_NAMING = (TokenType.FARROW, TokenType.COLON_EQ)
_NOT_PLAIN = ("DISTINCT", "ALL", "VARIADIC", "*")
"""First words of arguments that no further one can be added to."""


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A name that begins with infer and is followed by a parenthesis."""

    number: int
    """Calls that are written alike have the same one: PostgreSQL compares them, in GROUP BY and DISTINCT."""
    function: str
    name: Token
    edits: tuple[tuple[int, str], ...]
    """Insertions that give it its number."""


def written_calls(tokens: list[Token]) -> list[WrittenCall]:
    """In the order of the text."""
    numbers: dict[tuple[str, ...], int] = {}
    calls = []
    for position in range(len(tokens) - 1):
        function = _called_function(tokens, position)
        end = _closing(tokens, position + 1) if function else None
        if end is None:
            continue
        key = tuple(token.text for token in tokens[position : end + 1])
        arguments = _arguments(tokens[position + 2 : end])
        is_numbered = function in _OPTIONS_POSITION and bool(arguments) and len(numbers) < SITES_MAX
        if not is_numbered or any(part[0].text.upper() in _NOT_PLAIN for part in arguments if part):
            calls.append(WrittenCall(UNNUMBERED, function, tokens[position], ()))
            continue
        number = numbers.setdefault(key, len(numbers) + 1)
        edits = _edits(number, arguments, _OPTIONS_POSITION[function], tokens[end])
        calls.append(WrittenCall(number, function, tokens[position], edits))
    return calls


def marked(text: str, calls: Iterable[WrittenCall]) -> str:
    """The text with the calls' names replaced, so that they can be told apart once it is parsed."""
    for call in sorted(calls, key=lambda call: -call.name.start):
        text = f"{text[: call.name.start]}{_MARK}{call.number}{text[call.name.end + 1 :]}"
    return text


def number_of(node: exp.Expr) -> int | None:
    """Of a call in the parsed text of `marked`; None of anything else."""
    if isinstance(node, exp.Anonymous) and node.name.startswith(_MARK):
        return int(node.name.removeprefix(_MARK))
    return None


def _called_function(tokens: list[Token], position: int) -> str:
    """Empty if it is no call of ours."""
    token = tokens[position]
    name = token.text if token.token_type is TokenType.IDENTIFIER else token.text.lower()
    if not name.startswith(_PREFIX) or tokens[position + 1].token_type is not TokenType.L_PAREN:
        return ""
    if token.token_type is TokenType.STRING:
        return ""
    is_qualified = position > 1 and tokens[position - 1].token_type is TokenType.DOT
    return "" if is_qualified and tokens[position - 2].text.lower() not in _QUALIFIERS else name


def _closing(tokens: list[Token], opening: int) -> int | None:
    depth = 0
    for position in range(opening, len(tokens)):
        kind = tokens[position].token_type
        depth += (kind in _OPENING) - (kind in _CLOSING)
        if depth == 0:
            return position
    return None


def _arguments(tokens: list[Token]) -> list[list[Token]]:
    if not tokens:
        return []
    arguments: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token.token_type in _OPENING) - (token.token_type in _CLOSING)
        if depth == 0 and token.token_type is TokenType.COMMA:
            arguments.append([])
        else:
            arguments[-1].append(token)
    return arguments


def _edits(number: int, arguments: list[list[Token]], options_position: int, end: Token) -> tuple[tuple[int, str], ...]:
    carried = f"""'{{"{SITE_OPTION}": {number}}}'::pg_catalog.jsonb"""
    for index, argument in enumerate(arguments):
        is_named = len(argument) > 2 and argument[1].token_type in _NAMING
        if (argument[0].text.lower() == "options") if is_named else (index == options_position and argument):
            value = argument[2:] if is_named else argument
            return (
                (value[0].start, "COALESCE(("),
                (value[-1].end + 1, f"), '{{}}'::pg_catalog.jsonb) OPERATOR(pg_catalog.||) {carried}"),
            )
    return ((end.start, f", options => {carried}"),)
