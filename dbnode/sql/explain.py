"""stratakv.explain(): what a statement would ask the model, learned by running it with a stand-in for each call of its text.

In the text that is run, calls of infer() and its kin are those of schema `stratakv_probe`, which tell the listener their
arguments and are worth NULL. So an explained statement sees nothing that the same statement with NULL written for infer() would
not see; calls elsewhere (views, functions, policies) are refused while it runs. One `Explain` belongs to one connection of the
listener, from `explain` to `explained`, for a bounded time. Free of I/O.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

from dbnode.sql.commands import Explained, Probe
from dbnode.sql.errors import NotSupported
from dbnode.sql.lexer import SqlToken, TokenKind, UnreadableSql, tokenize
from dbnode.sql.service import InferCall
from stratakv.errors import DeadlineExceeded, InvalidRequest, Overloaded, PermissionDenied, StrataError

EXPLAINS_MAX = 8
"""At a time, in one DB node."""
EXPLAIN_S_MAX = 60.0
PROMPTS_MAX = 50_000
"""Different ones."""
PROMPT_BYTES_MAX = 16 * 1024 * 1024
"""Of them together."""
PROBE_SCHEMA = "stratakv_probe"
PROBED = frozenset(
    {"infer", "infer_json", "infer_choice", "infer_bool", "infer_row", "infer_tokens", "infer_agg", "infer_fold"}
)
COUNT_TOKENS = "@count_tokens"
_FIRST_WORDS = ("select", "with", "values", "table")
_TOKEN_BYTES = 16


class ExplainFull(StrataError):
    """As much has been seen as is looked at; ends the statement that is explained, never another one."""

    sqlstate = "SKV01"


class NothingToExplain(InvalidRequest):
    """The text is no single query."""

    sqlstate = "0A000"


class NoExplain(InvalidRequest):
    """Nothing is being explained in this session."""

    sqlstate = "55000"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What different prompts would cost, as far as it can be known beforehand."""

    prompt_tokens: int
    prompt_tokens_median: int
    prompt_tokens_max: int
    cached_tokens: int
    """In a worker or the pool now."""
    shared_tokens: int
    """Others that an earlier prompt of the statement begins with too."""
    estimated_s: float | None
    """None without workers."""


class Explainer(Protocol):
    """Implemented by `dbnode.sql_explain`."""

    async def estimate(self, calls: Sequence[InferCall]) -> Estimate:
        """Raises StrataError."""
        ...


@dataclass(slots=True)
class Explain:
    """What has been seen of one statement."""

    query: str = field(repr=False)
    """What to run."""
    sites: list[str]
    """Functions that the text calls, in its order."""
    role: str
    database: str
    pid: int
    deadline_s: float
    token: str = field(default_factory=lambda: secrets.token_hex(_TOKEN_BYTES), repr=False)
    num_calls: int = 0
    num_depending: int = 0
    """Calls without a prompt: NULL, or made of another answer."""
    num_counts: int = 0
    """Calls that count tokens."""
    is_whole: bool = True
    size_bytes: int = 0
    calls: dict[tuple[str | None, str, str], InferCall] = field(default_factory=dict, repr=False)

    def probe(self, command: Probe) -> None:
        """Raises ExplainFull, DeadlineExceeded, PermissionDenied."""
        self.check(command.pid)
        self.num_calls += 1
        if command.call is None:
            self.num_depending += 1
            return
        if COUNT_TOKENS in command.call.options:
            self.num_counts += 1
            return
        call = command.call
        key = call.model, json.dumps(call.options, sort_keys=True), call.prompt
        if key in self.calls:
            return
        self.size_bytes += len(call.prompt.encode())
        if len(self.calls) >= PROMPTS_MAX or self.size_bytes > PROMPT_BYTES_MAX:
            self.is_whole = False
            raise ExplainFull("enough prompts have been seen")
        self.calls[key] = call.call("explain")

    def check(self, pid: int, token: str | None = None) -> None:
        """Raises DeadlineExceeded, PermissionDenied."""
        if pid != self.pid or (token is not None and not secrets.compare_digest(token, self.token)):
            raise PermissionDenied("this is not the session that explains")
        if asyncio.get_running_loop().time() > self.deadline_s:
            raise DeadlineExceeded(f"stratakv.explain() may take {EXPLAIN_S_MAX:g} s")


def begin(query: str, names: frozenset[str], role: str, database: str, pid: int) -> Explain:
    """`names` are functions of ours that the session finds without a schema. Raises NothingToExplain, NotSupported."""
    text, sites = probing(query, names)
    deadline_s = asyncio.get_running_loop().time() + EXPLAIN_S_MAX
    return Explain(text, sites, role, database, pid, deadline_s)


def probing(query: str, names: frozenset[str]) -> tuple[str, list[str]]:
    """The query with stand-ins for its calls, and which they are. Raises NothingToExplain, NotSupported."""
    try:
        tokens = list(tokenize(query))
    except UnreadableSql as error:
        raise NotSupported(f"this cannot be read: {error}", hint="Write such a string as E'…'.") from None
    while tokens and query[tokens[-1].start] == ";":
        query = query[: tokens.pop().start]
    _check_single(query, tokens)
    sites: list[str] = []
    pieces: list[str] = []
    position = 0
    for index, token in enumerate(tokens[:-1]):
        name = _name(query, token)
        if name not in PROBED or query[tokens[index + 1].start] != "(":
            continue
        schema_at = _schema_at(query, tokens, index)
        schema = None if schema_at is None else _name(query, tokens[schema_at])
        if not (schema == "stratakv" or (schema in (None, "public") and name in names)):
            continue
        start = token.start if schema_at is None else tokens[schema_at].start
        pieces += [query[position:start], f"{PROBE_SCHEMA}.{name}"]
        position = token.end
        sites.append(name)
    return "".join([*pieces, query[position:]]), sites


def _check_single(query: str, tokens: list[SqlToken]) -> None:
    first = next((query[t.start : t.end].lower() for t in tokens if query[t.start] != "("), "")
    if first not in _FIRST_WORDS or any(query[t.start] == ";" for t in tokens):
        raise NothingToExplain(
            "stratakv.explain() takes one query: SELECT, VALUES, TABLE or WITH",
            hint="Give the SELECT of an INSERT or UPDATE.",
        )


def _name(query: str, token: SqlToken) -> str | None:
    text = query[token.start : token.end]
    if token.kind is TokenKind.WORD:
        return text.lower()
    return text[1:-1] if token.kind is TokenKind.QUOTED and text[0] == '"' else None


def _schema_at(query: str, tokens: list[SqlToken], index: int) -> int | None:
    """Position of the name before the dot before this one."""
    return index - 2 if index >= 2 and query[tokens[index - 1].start] == "." else None


class Explaining:
    """What one connection of the listener explains: at most one statement."""

    def __init__(self, explainer: Explainer | None, others: set[Explaining]) -> None:
        """`others` are those of the DB node that have something to explain."""
        self._explainer = explainer
        self._others = others
        self._explain: Explain | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, query: str, names: frozenset[str], role: str, database: str, pid: int) -> str:
        """The query to run, and the token by which it ends, as JSON. Raises StrataError."""
        self.drop()
        if self._explainer is None:
            raise NotSupported("this DB node cannot explain statements")
        if len(self._others) >= EXPLAINS_MAX:
            raise Overloaded(f"{EXPLAINS_MAX} statements are being explained, which is the limit", hint="Try again.")
        self._explain = explain = begin(query, names, role, database, pid)
        self._others.add(self)
        self._timer = asyncio.get_running_loop().call_later(EXPLAIN_S_MAX, self._forget_prompts)
        return json.dumps({"query": explain.query, "token": explain.token})

    def probe(self, command: Probe) -> None:
        """Raises NoExplain, and what `Explain.probe` raises."""
        self._current().probe(command)

    async def end(self, command: Explained) -> str:
        """The report, as JSON. Raises StrataError."""
        explain = self._current()
        explain.check(command.pid, command.token)
        assert self._explainer is not None
        try:
            return answer(explain, await self._explainer.estimate(tuple(explain.calls.values())), command.num_rows)
        finally:
            self.drop()

    def drop(self) -> None:
        """The statement has ended, however."""
        self._forget_prompts()
        self._explain = None

    def _forget_prompts(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._explain is not None:
            self._explain.calls.clear()
        self._others.discard(self)

    def _current(self) -> Explain:
        if self._explain is None:
            raise NoExplain(f"functions of {PROBE_SCHEMA} are for stratakv.explain() only")
        return self._explain


# The report


def answer(explain: Explain, estimate: Estimate, num_rows: int) -> str:
    """JSON: the report, and the lines of its text form."""
    report = _report(explain, estimate, num_rows)
    return json.dumps({"report": report, "lines": list(_lines(report))})


def _report(explain: Explain, estimate: Estimate, num_rows: int) -> dict[str, object]:
    hits = estimate.cached_tokens + estimate.shared_tokens
    return {
        "call_sites": explain.sites,
        "rows": num_rows,
        "calls": explain.num_calls,
        "calls_without_prompt": explain.num_depending,
        "token_counts": explain.num_counts,
        "distinct_prompts": len(explain.calls),
        **asdict(estimate),
        "expected_hit_ratio": round(hits / estimate.prompt_tokens, 4) if estimate.prompt_tokens else 0.0,
        "is_whole": explain.is_whole,
    }


def _lines(report: dict[str, object]) -> list[tuple[str, str]]:
    sites = Counter(str(name) for name in report["call_sites"])  # type: ignore[attr-defined]
    named = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in sites.items())
    tokens = (
        f"{report['prompt_tokens']} (median {report['prompt_tokens_median']}, longest {report['prompt_tokens_max']})"
    )
    ratio, seconds = report["expected_hit_ratio"], report["estimated_s"]
    lines = [
        ("call sites", named or "none"),
        ("rows", f"{report['rows']} (with NULL for each answer)"),
        ("calls", str(report["calls"])),
    ]
    if report["calls_without_prompt"]:
        lines.append(("calls without a prompt", f"{report['calls_without_prompt']} (NULL, or made of another answer)"))
    if report["token_counts"]:
        lines.append(("token counts", str(report["token_counts"])))
    lines += [
        ("distinct prompts", str(report["distinct_prompts"])),
        ("prompt tokens", tokens),
        ("tokens cached now", str(report["cached_tokens"])),
        ("tokens shared with another prompt", str(report["shared_tokens"])),
        ("expected prefix hits", f"{100 * ratio:.1f} %"),  # type: ignore[operator]
        ("estimated time", "unknown: no worker is there" if seconds is None else f"{seconds:.1f} s"),
    ]
    if not report["is_whole"]:
        lines.append(("note", "there are more prompts than are looked at"))
    return lines
