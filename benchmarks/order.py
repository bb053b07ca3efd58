"""order: how much of the prompts of a table hits the cache as written, sorted, and with the fields of each row reordered (ours).
`one_order` beside them is the best single order of columns for all rows, most repeated first.

A prompt is what infer_row() makes of a row without a template: its fields, one `name: value` a line. Prompts come one after
another to a cache without bounds that keeps whole blocks of 16 characters. No model is asked.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Spread, parse_options, report
from benchmarks.tables import orders_table, read_table
from dbnode.sql.row_prompt import RowPrompt, ordered_texts
from stratakv.settings import SqlSettings

BLOCK_CHARS = 16
ROWS, ROWS_QUICK = 15_000, 3_000
RUNS, RUNS_QUICK = 5, 1


def hit_share(prompts: Sequence[str]) -> float:
    """Characters in leading blocks that an earlier prompt began with too, of all characters."""
    seen: set[tuple[int, str]] = set()
    numbers: dict[tuple[int, str], int] = {}
    hits = 0
    for prompt in prompts:
        parent, is_hit = 0, True
        for start in range(0, len(prompt) - BLOCK_CHARS + 1, BLOCK_CHARS):
            block = (parent, prompt[start : start + BLOCK_CHARS])
            is_hit = is_hit and block in seen
            hits += BLOCK_CHARS * is_hit
            seen.add(block)
            parent = numbers.setdefault(block, len(numbers) + 1)
    return hits / sum(map(len, prompts))


def main() -> int:
    options = parse_options(__doc__, _add_options)
    num_rows = ROWS_QUICK if options.quick else ROWS
    table = read_table(options.csv) if options.csv is not None else orders_table(num_rows, options.seed)
    rows = [RowPrompt("", "", tuple(row.items())) for row in table]
    seconds = []
    for _ in range(RUNS_QUICK if options.quick else RUNS):
        started_s = time.perf_counter()
        ours = sorted(ordered_texts(rows, options.budget_s))
        seconds.append(time.perf_counter() - started_s)
    written = [row.text() for row in rows]
    arms = {
        "ours": ours,
        "written": written,
        "sorted": sorted(written),
        "one_order": sorted(ordered_texts(rows, 0.0)),
    }
    shares = {name: round(hit_share(prompts), 4) for name, prompts in arms.items()}
    report(
        "order",
        {
            "data": "generated" if options.csv is None else options.csv.name,
            "rows": len(rows),
            "columns": len(table[0]),
            "characters": sum(map(len, written)),
            "block_characters": BLOCK_CHARS,
            "budget_s": options.budget_s,
            "quick": options.quick,
            "seed": options.seed,
        },
        {"hit_share": shares["ours"], "seconds": Spread.of(seconds).as_json()},
        {f"hit_share_{name}": shares[name] for name in ("written", "sorted", "one_order")},
        {"hit_share_ours_over_sorted": round(shares["ours"] / shares["sorted"], 2) if shares["sorted"] else None},
    )
    return 0


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, help="a table with a header line; by default one is generated")
    budget_s = SqlSettings().order_budget_s
    parser.add_argument("--budget-s", type=float, default=budget_s, help=f"time for the order of fields ({budget_s} s)")


if __name__ == "__main__":
    sys.exit(main())
