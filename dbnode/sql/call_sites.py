"""Which calls of infer() in a statement decide whether others are made. Free of I/O; for speed only.

In a collect pass NULL stands for an answer that is not known yet. A call that is made because of such a NULL may not be made in
the end. So the calls are numbered (`dbnode.sql.written_calls`), and the SELECT of the pass carries the numbers: then the listener
knows which call it is asked for, and puts off those that depend on what it has not answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

from sqlglot import exp

from dbnode.sql.written_calls import UNNUMBERED, WrittenCall, number_of

GOVERNORS_MAX = 8
"""Of one call. What depends on more is sent at once: each is a round of the model, and passes are few."""
_PLAIN_FUNCTIONS = (
    *("to_json", "to_jsonb", "row_to_json", "json_build_object", "jsonb_build_object", "json_build_array"),
    *("jsonb_build_array", "jsonb_agg", "jsonb_array_elements", "jsonb_array_elements_text", "jsonb_each_text"),
    *("jsonb_pretty", "jsonb_strip_nulls", "quote_literal", "regexp_matches", "convert_to"),
)
"""PostgreSQL's own among those that the parser does not know; any other one may call infer()."""
_ROUNDS_MAX = 8
"""Derived tables within each other that a column is followed through."""


@dataclass(frozen=True, slots=True)
class CallSites:
    """Of a statement in which some calls govern others."""

    select: str
    """What a pass may run instead of the plain SELECT."""
    governors: Mapping[int, frozenset[int]]
    """By the number of a call: the calls by which it is made or not, if they come first."""


def call_sites(
    select: str, calls: list[WrittenCall], query: exp.Query, views: frozenset[str] = frozenset()
) -> CallSites | None:
    """`query` is the parsed text of `marked`; `views` call infer() themselves. None if no call governs another."""
    views = frozenset(table.name for table in query.find_all(exp.Table) if is_named(table.name, views))
    if len({call.number for call in calls}) + bool(views) < 2:
        return None
    governors = _Governing(query, {call.number: call.function for call in calls}, views).governors()
    if not governors:
        return None
    edits = [edit for call in calls for edit in call.edits]
    for position, inserted in sorted(edits, reverse=True):
        select = select[:position] + inserted + select[position:]
    return CallSites(select, governors)


def has_one_level(calls: list[WrittenCall], query: exp.Query, views: frozenset[str] = frozenset()) -> bool:
    """Whether no answer can lead to another call: there is one call, and nothing that may hide one or repeat it."""
    numbers = {call.number for call in calls}
    if len(numbers) != 1 or UNNUMBERED in numbers:
        return False
    return not (
        any(clause.args.get("recursive") for clause in query.find_all(exp.With))
        or any(number_of(f) is None and f.name.lower() not in _PLAIN_FUNCTIONS for f in query.find_all(exp.Anonymous))
        or any(is_named(table.name, views) for table in query.find_all(exp.Table))
    )


def is_named(name: str, views: frozenset[str]) -> bool:
    """Whether a name, as it is written, may be one of the views."""
    return bool(views) and (name in views or name.lower() in views)


class _Governing:
    """One analysis. Columns are followed by their names alone: what is found too much costs a round, nothing else."""

    def __init__(self, query: exp.Query, functions: Mapping[int, str], views: frozenset[str]) -> None:
        self._query = query
        self._functions = functions
        self._views = views
        self._queries = {cte.alias.lower(): cte.this for cte in query.find_all(exp.CTE)}
        self._columns: dict[str, frozenset[int]] = {}
        """Calls that a column of a derived table is made of."""
        for _ in range(_ROUNDS_MAX):
            before = dict(self._columns)
            self._follow_columns()
            if self._columns == before:
                break

    def governors(self) -> dict[int, frozenset[int]]:
        """Of each call that has some, those of its governors included."""
        direct: dict[int, frozenset[int]] = {}
        for node in self._query.find_all(exp.Anonymous):
            number = number_of(node)
            if number is not None and number != UNNUMBERED:
                found = self._above(node) | self._within(node.expressions)
                direct[number] = direct.get(number, found) & found
        closed = {number: _closure(number, direct) for number in direct}
        return {number: found for number, found in closed.items() if 0 < len(found) <= GOVERNORS_MAX}

    # Columns

    def _follow_columns(self) -> None:
        for select in self._query.find_all(exp.Select):
            for projection in select.expressions:
                self._add_column(self._output_name(projection), self._within([projection]))
        for alias in self._query.find_all(exp.TableAlias):
            source = alias.parent.this if isinstance(alias.parent, exp.CTE | exp.Subquery) else None
            for select in _arms(source):
                for column, projection in zip(alias.columns, select.expressions, strict=False):
                    self._add_column(column.name, self._within([projection]))
                self._add_column(alias.name, self._within(select.expressions))

    def _add_column(self, name: str, sites: frozenset[int]) -> None:
        if name and sites:
            self._columns[name.lower()] = self._columns.get(name.lower(), frozenset()) | sites

    def _output_name(self, projection: exp.Expr) -> str:
        if isinstance(projection, exp.Cast):
            return self._output_name(projection.this)
        if isinstance(projection, exp.Dot):
            return self._output_name(projection.expression)
        number = number_of(projection)
        if number is not None:
            return self._functions.get(number, "")
        if isinstance(projection, exp.Func) and not isinstance(projection, exp.Anonymous):
            return projection.sql_name()
        return projection.alias_or_name

    def _within(self, nodes: Iterable[exp.Expr | None]) -> frozenset[int]:
        """Calls that the value of the nodes depends on."""
        found: set[int] = set()
        for node in nodes:
            for part in node.walk() if node is not None else ():
                if isinstance(part, exp.Column):
                    found |= self._columns.get(part.name.lower(), frozenset())
                    if self._views:
                        found.add(UNNUMBERED)  # it may be a view's
                elif (number := number_of(part)) is not None:
                    found.add(number)
        return frozenset(found)

    # Order of evaluation

    def _above(self, node: exp.Expr) -> frozenset[int]:
        found: frozenset[int] = frozenset()
        child: exp.Expr = node
        while (parent := child.parent) is not None:
            found |= self._within(self._evaluated_first(parent, child))
            if isinstance(parent, exp.Select):
                found |= self._from_sources(parent, frozenset({id(child)}))
            child = parent
        return found

    def _evaluated_first(self, parent: exp.Expr, child: exp.Expr) -> Iterator[exp.Expr | None]:
        """Parts of `parent` by whose value `child` is evaluated or not."""
        match parent:
            case exp.And():  # PostgreSQL orders conditions by cost: the one that is seen first governs
                yield parent.expression if child is parent.this else parent.this
            case exp.Or():
                yield parent.this if child is parent.expression else None
            case exp.Coalesce():
                yield from _before(child, [parent.this, *parent.expressions])
            case exp.If():
                yield parent.this if child is not parent.this else None
            case exp.Case():
                operand, branches = parent.args.get("this"), parent.args["ifs"]
                yield operand if child is not operand else None
                yield from (branch.this for branch in _before(child, branches) if child is not operand)
            case exp.Filter():
                yield parent.expression if child is parent.this else None
            case exp.Select():
                yield from _clauses_before(parent, child)

    def _from_sources(self, select: exp.Select, seen: frozenset[int]) -> frozenset[int]:
        """Calls that decide which rows the derived tables of a SELECT have."""
        found: frozenset[int] = frozenset()
        for source in _sources(select):
            if isinstance(source, exp.Table) and source.name in self._views:
                found |= {UNNUMBERED}
            query = self._queries.get(source.name.lower()) if isinstance(source, exp.Table) else source
            while isinstance(query, exp.Subquery | exp.Lateral):
                query = query.this
            if query is None or id(query) in seen or id(source.parent) in seen:
                continue
            for inner in query.find_all(exp.Select):
                found |= self._within(_row_clauses(inner)) | self._from_sources(inner, seen | {id(query)})
        return found


def _arms(query: exp.Expr | None) -> Iterator[exp.Select]:
    """The SELECTs that a UNION or the like is made of."""
    if isinstance(query, exp.SetOperation):
        yield from (*_arms(query.this), *_arms(query.expression))
    elif isinstance(query, exp.Subquery):
        yield from _arms(query.this)
    elif isinstance(query, exp.Select):
        yield query


def _closure(number: int, direct: Mapping[int, frozenset[int]]) -> frozenset[int]:
    found: frozenset[int] = frozenset()
    todo = direct[number]
    while new := todo - found:
        found |= new
        todo = reduce(frozenset.union, (direct.get(other, frozenset()) for other in new), frozenset[int]())
    return found - {number}


def _before(child: exp.Expr, parts: list[exp.Expr]) -> list[exp.Expr]:
    """Those that come before `child`; all if it is none of them."""
    for position, part in enumerate(parts):
        if part is child:
            return parts[:position]
    return parts


def _sources(select: exp.Select) -> Iterator[exp.Expr]:
    for clause in (*_clauses(select, exp.From), *_clauses(select, exp.Join), *_clauses(select, exp.Lateral)):
        yield clause if isinstance(clause, exp.Lateral) else clause.this


def _clauses(select: exp.Select, *kinds: type[exp.Expr]) -> Iterator[exp.Expr]:
    """Clauses of these kinds."""
    for value in select.args.values():
        for clause in value if isinstance(value, list) else [value]:
            if isinstance(clause, kinds):
                yield clause


def _row_clauses(select: exp.Select) -> Iterator[exp.Expr | None]:
    """What decides which rows a SELECT has."""
    yield from (join.args.get("on") for join in _clauses(select, exp.Join))
    yield from _clauses(select, exp.Where, exp.Group, exp.Having)
    if any(_clauses(select, exp.Limit, exp.Fetch)):
        yield from _clauses(select, exp.Order)


def _clauses_before(select: exp.Select, child: exp.Expr) -> Iterator[exp.Expr | None]:
    """Clauses by which `child`, another one, is evaluated or not; what is seen first governs where the order is open."""
    match child:
        case exp.With() | exp.Limit() | exp.Fetch() | exp.Offset():
            return
        case exp.Where():
            yield from (join.args.get("on") for join in _clauses(select, exp.Join))
        case exp.Join() | exp.From() | exp.Lateral():
            yield from (join.args.get("on") for join in _clauses(select, exp.Join) if join is not child)
            yield from _clauses(select, exp.Where)
        case exp.Group():
            yield from (clause for clause in _row_clauses(select) if not isinstance(clause, exp.Group | exp.Having))
        case exp.Having():
            yield from (clause for clause in _row_clauses(select) if clause is not child)
        case exp.Order():
            yield from (clause for clause in _row_clauses(select) if clause is not child)
        case _:
            yield from _row_clauses(select)
