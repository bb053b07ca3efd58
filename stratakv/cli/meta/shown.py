"""What the commands of `stratakv meta` share: a list as a table or JSON, and what a change says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from stratakv.cli.options import print_json, printable, table_console


def show(as_json: bool, value: Any, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """`value` for programs, or a table for people."""
    if as_json:
        print_json(value)
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(printable, row))
    table_console().print(table, markup=False)


def done(as_json: bool, text: str, **fields: Any) -> None:
    """A change was made."""
    if as_json:
        print_json(fields)
    else:
        print(printable(text))


def share_of(used: int, limit: int) -> str:
    """`used` as a share of a limit, where 0 is none."""
    return f"{100 * used / limit:.0f} %" if limit else "no limit"
