"""sql_real: the real model over the rows of a table, with prompts and fields ordered for reuse (ours) and as they are written.

Both look ahead; the baseline sends the prompts in the table's order, with the fields in the order of its columns. Each side has
an instance of its own (`stratakv up`), so that each begins with nothing cached, and is asked once. Figures are those of the usage
events: prompt tokens, and those of them whose KV was in a cache.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from benchmarks.harness import parse_options, report
from benchmarks.tables import Table, orders_table, read_table
from stratakv.up.instance import scratch_instance

ROWS, ROWS_QUICK = 400, 32
OUTPUT_TOKENS = 4
QUESTION = "Is this good or bad? Answer with one word."
SETTLE_S_MAX = 30.0
WARM_UP = "SELECT infer('Say yes.', options => '{\"max_tokens\": 1}')"
USAGE = (
    "SELECT count(*), sum(prompt_tokens), sum(cached_l1_tokens), sum(cached_l2_tokens), sum(cached_pool_tokens)"
    " FROM stratakv.usage_events WHERE source = 'sql'"
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One side."""

    seconds: float
    num_rows: int
    prompt_tokens: int
    cached_tokens: tuple[int, int, int]
    """In L1, L2 and the pool."""

    @property
    def rows_per_s(self) -> float:
        return self.num_rows / self.seconds

    @property
    def hit_share(self) -> float:
        return sum(self.cached_tokens) / self.prompt_tokens

    def as_json(self) -> dict[str, Any]:
        return {
            "rows_per_s": round(self.rows_per_s, 2),
            "hit_share": round(self.hit_share, 4),
            "seconds": round(self.seconds, 2),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": dict(zip(("l1", "l2", "pool"), self.cached_tokens, strict=True)),
        }


def load(connection: psycopg.Connection[Any], table: Table) -> None:
    """Into a table `rows`, all of it text."""
    columns = [sql.SQL("{} text").format(sql.Identifier(name)) for name in table[0]]
    connection.execute(sql.SQL("CREATE TABLE rows ({})").format(sql.SQL(", ").join(columns)))
    with connection.cursor().copy("COPY rows FROM STDIN") as copy:
        for row in table:
            copy.write_row(list(row.values()))


def used(connection: psycopg.Connection[Any], num_calls: int) -> list[int]:
    """Prompt tokens, and cached ones by tier, once the events of so many calls are written."""
    deadline_s = time.monotonic() + SETTLE_S_MAX
    while True:
        row = connection.execute(USAGE).fetchone()
        assert row is not None
        if row[0] >= num_calls:
            return [int(value) for value in row[1:]]
        if time.monotonic() > deadline_s:
            raise SystemExit(f"only {row[0]} of {num_calls} usage events were written")
        time.sleep(0.1)


def measure(table: Table, template: str, settings: Sequence[str], *, quiet: bool) -> Measured:
    """One statement over the table on an instance that has nothing cached."""
    flags = [word for setting in settings for word in ("--set", setting)]
    with (
        scratch_instance(*flags, quiet=quiet) as instance,
        psycopg.connect(instance.state["sql_url"], autocommit=True) as connection,
    ):
        load(connection, table)
        connection.execute(WARM_UP)
        before = used(connection, 1)
        options = f'{{"max_tokens": {OUTPUT_TOKENS}}}'
        query = "SELECT infer_row(%s, to_jsonb(r), options => %s) FROM rows r"
        started_s = time.perf_counter()
        rows = connection.execute(query, (template, options)).fetchall()
        seconds = time.perf_counter() - started_s
        after = used(connection, 1 + len(table))
    if len(rows) != len(table):
        raise SystemExit(f"{len(rows)} answers for {len(table)} rows")
    prompt, l1, l2, pool = (now - then for now, then in zip(after, before, strict=True))
    return Measured(seconds, len(rows), prompt, (l1, l2, pool))


def main() -> int:
    options = parse_options(__doc__, _add_options)
    num_rows = options.rows or (ROWS_QUICK if options.quick else ROWS)
    read = read_table(options.csv) if options.csv is not None else orders_table(num_rows, options.seed)
    table = [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in read)][:num_rows]
    as_written = "\n".join(f"{_escaped(name)}: {{{name}}}" for name in table[0])
    written = measure(table, f"{QUESTION}\n{as_written}", ("sql.order_budget_s=0",), quiet=options.json)
    ordered = measure(table, QUESTION, (), quiet=options.json)
    report(
        "sql_real",
        {
            "data": "generated" if options.csv is None else options.csv.name,
            "rows": len(table),
            "columns": len(table[0]),
            "max_tokens": OUTPUT_TOKENS,
            "quick": options.quick,
            "seed": options.seed,
        },
        ordered.as_json(),
        written.as_json(),
        {
            "hit_share_ordered_over_written": round(ordered.hit_share / max(written.hit_share, 1e-9), 2),
            "rows_per_s_ordered_over_written": round(ordered.rows_per_s / written.rows_per_s, 2),
        },
    )
    return 0


def _escaped(text: str) -> str:
    """As a template has it."""
    return text.replace("{", "{{").replace("}", "}}")


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, help="a table with a header line; by default one is generated")
    parser.add_argument("--rows", type=int, help=f"the first so many rows ({ROWS}; with --quick {ROWS_QUICK})")


if __name__ == "__main__":
    sys.exit(main())
