"""Which statements a collect pass can be run for, and the SELECT to run. Free of I/O; for speed only.

A statement that is misread here only loses its hints, or has its SELECT run once more in a read-only transaction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import sqlglot
from sqlglot import Token, TokenType, exp
from sqlglot.errors import SqlglotError

from dbnode.sql.call_sites import CallSites, call_sites, has_one_level, is_named
from dbnode.sql.explained import explained
from dbnode.sql.merged import merged
from dbnode.sql.token_lists import clauses_of, split, top_level, written
from dbnode.sql.written_calls import marked, written_calls
from stratakv.log import EventLogger

log = EventLogger(__name__)

TEXT_CHARS_MAX = 32 * 1024
"""Longest statement that is parsed; longer ones go without hints."""
TOKENS_MAX = 2000
"""Of such a statement: parsing takes some ten microseconds for each, in which nothing else is served."""
_CACHED_MAX = 256
_DIALECT = "postgres"
_FORBIDDEN = (exp.TableSample, exp.Lock, exp.DML, exp.Into, exp.Command)
"""What reads at random, locks or writes."""
_BOUNDED = (exp.Limit, exp.Fetch, exp.Exists)
_QUERY_STARTS = (TokenType.SELECT, TokenType.WITH, TokenType.L_PAREN)
_FILLED = ("TABLE", "MATERIALIZED")
_CREATE_WORDS = 4
"""CREATE LOCAL TEMPORARY TABLE is the longest beginning."""
# The parser warns of what it does not know by logging the statement.
logging.getLogger("sqlglot").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Collectable:
    """What a pass may run."""

    select: str
    functions: frozenset[str]
    """Every name that is followed by a parenthesis: a superset of the functions that are called."""
    is_bounded: bool
    """Whether it may end before it has seen every row."""
    sites: CallSites | None = None
    """Where some calls decide about others."""
    is_one_level: bool = False
    """Whether one pass sees all calls, since no answer leads to another one."""


@lru_cache(maxsize=_CACHED_MAX)
def collectable(text: str, views: frozenset[str] = frozenset(), owner: str = "") -> Collectable | None:
    """What to run for a statement, or None if it goes without hints. `views` are those that call infer().

    What is remembered is each `owner`'s: how long it takes must not tell that another role has sent the same text.
    """
    if (explain := explained(text)) is not None:
        return collectable(explain.statement, views, owner) if explain.is_run else None
    if len(text) > TEXT_CHARS_MAX:
        return None
    try:
        tokens = sqlglot.tokenize(text, dialect=_DIALECT)
        if not any("infer" in token.text.lower() or is_named(token.text, views) for token in tokens):
            return None
        select = _inner_select(text, tokens) if len(tokens) <= TOKENS_MAX else None
        if select is None:
            return None
        calls = written_calls(tokens if select is text else sqlglot.tokenize(select, dialect=_DIALECT))
        statements = sqlglot.parse(marked(select, calls), dialect=_DIALECT)
        query = statements[0] if len(statements) == 1 else None
        if not isinstance(query, exp.Query) or query.find(*_FORBIDDEN) is not None:
            return None
        if query.find(exp.From) is None:
            return None  # one row: there is nothing to batch
        is_bounded = query.find(*_BOUNDED) is not None
        return Collectable(
            select,
            frozenset(_called(tokens)),
            is_bounded,
            sites=call_sites(select, calls, query, views),
            is_one_level=not is_bounded and has_one_level(calls, query, views),
        )
    except (SqlglotError, RecursionError):
        return None
    except Exception as error:  # the parser's own mistakes; its messages would show the statement
        log.warning("statement_not_parsed", error=type(error).__name__)
        return None


def _called(tokens: list[Token]) -> Iterator[str]:
    for token, following in pairwise(tokens):
        if following.token_type is TokenType.L_PAREN and token.text:
            yield token.text if token.token_type is TokenType.IDENTIFIER else token.text.lower()


def _inner_select(text: str, tokens: list[Token]) -> str | None:
    """The part of a statement that reads; all of it is kept as it was written."""
    while tokens and tokens[-1].token_type is TokenType.SEMICOLON:
        tokens = tokens[:-1]
    if not tokens:
        return None
    first = tokens[0].token_type
    if first in _QUERY_STARTS:
        return text
    if first is TokenType.INSERT:
        return _inserted(text, tokens)
    if first is TokenType.CREATE:
        return _created(text, tokens)
    if first is TokenType.COPY:
        return _copied(text, tokens)
    if first is TokenType.UPDATE:
        return _updated(text, tokens[1:])
    if first is TokenType.DELETE and len(tokens) > 1:
        return _deleted(text, tokens[2:])
    if first is TokenType.MERGE:
        return merged(text, tokens[1:])
    return None


def _inserted(text: str, tokens: list[Token]) -> str | None:
    start = None
    for position in top_level(tokens):
        kind = tokens[position].token_type
        if start is None and kind in (TokenType.SELECT, TokenType.WITH):
            start = position
        elif start is not None and (
            kind is TokenType.RETURNING or (kind is TokenType.ON and _is_conflict(tokens, position))
        ):
            return written(text, tokens[start:position])
    return None if start is None else written(text, tokens[start:])


def _is_conflict(tokens: list[Token], position: int) -> bool:
    return position + 1 < len(tokens) and tokens[position + 1].text.upper() == "CONFLICT"


def _created(text: str, tokens: list[Token]) -> str | None:
    """CREATE TABLE … AS and CREATE MATERIALIZED VIEW; WITH NO DATA runs nothing, and neither does a plain view."""
    if not any(token.text.upper() in _FILLED for token in tokens[1:_CREATE_WORDS]):
        return None
    for position in top_level(tokens):
        if tokens[position].token_type is TokenType.ALIAS:
            query = tokens[position + 1 :]
            if not query or query[0].token_type not in _QUERY_STARTS:
                return None
            tail = [token.text.upper() for token in query[-3:]]
            if tail == ["WITH", "NO", "DATA"]:
                return None
            return written(text, query[:-2] if tail[1:] == ["WITH", "DATA"] else query)
    return None


def _copied(text: str, tokens: list[Token]) -> str | None:
    """COPY (query) TO …"""
    if len(tokens) < 2 or tokens[1].token_type is not TokenType.L_PAREN:
        return None
    top = list(top_level(tokens))
    end = top[2] - 1 if len(top) > 2 else len(tokens) - 1
    return written(text, tokens[2:end])


def _updated(text: str, tokens: list[Token]) -> str | None:
    """UPDATE target SET column = value, … FROM … WHERE … RETURNING …"""
    target, clauses = clauses_of(tokens, ("SET", "FROM", "WHERE", "RETURNING"))
    values = []
    for assignment in split(clauses.get("SET", []), lambda token: token.token_type is TokenType.COMMA):
        sides = split(assignment, lambda token: token.token_type is TokenType.EQ)
        if len(sides) < 2 or not sides[0] or not sides[1]:
            return None
        value = assignment[len(sides[0]) + 1 :]
        if [token.text.upper() for token in value] != ["DEFAULT"]:
            values.append(written(text, value))
    return _read(text, ", ".join(values) or "1", target, clauses.get("FROM"), clauses.get("WHERE"))


def _deleted(text: str, tokens: list[Token]) -> str | None:
    """DELETE FROM target USING … WHERE … RETURNING …"""
    target, clauses = clauses_of(tokens, ("USING", "WHERE", "RETURNING"))
    return _read(text, "1", target, clauses.get("USING"), clauses.get("WHERE"))


def _read(
    text: str, values: str, target: list[Token], others: list[Token] | None, condition: list[Token] | None
) -> str | None:
    """What such a statement reads, before it writes."""
    if not target or others == [] or condition == []:
        return None
    source = written(text, target) + (f", {written(text, others)}" if others else "")
    return f"SELECT {values} FROM {source}" + (f" WHERE {written(text, condition)}" if condition else "")
