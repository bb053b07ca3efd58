"""`stratakv usage`: who used how much, from the daily sums in the metadata."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any

import typer
from rich.table import Table

from stratakv.cli.options import (
    ConfigOption,
    DatabaseOption,
    JsonOption,
    SetOption,
    StateFileOption,
    database_url,
    print_json,
    printable,
    running_settings,
    table_console,
)
from stratakv.usage_report import COUNTS, GroupBy, UsageQuery, read_usage

_MONTH = re.compile(r"(\d{4})-(\d{2})")
_TITLES = {
    "prompt_tokens": "prompt tokens",
    "cached_tokens": "cached",
    "generated_tokens": "generated tokens",
    "unused_requests": "unused requests",
    "unused_tokens": "unused tokens",
}


def usage(
    by: Annotated[
        list[GroupBy] | None, typer.Option("--by", help="What the sums are of; repeatable. By default tenants.")
    ] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Of this tenant only.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Of this model only.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="DATE", help="From this day (2026-03-01) or month (2026-03) on.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="DATE", help="To the end of this day or month.")
    ] = None,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Requests and tokens by day, month, tenant or model (in UTC)."""
    query = UsageQuery(by or [GroupBy.TENANT], tenant, model, parse_day(since), parse_day(until, is_end=True))
    if query.since and query.until and query.since > query.until:
        raise typer.BadParameter(f"--since {since} is later than --until {until}")
    rows = read_usage(database_url(database, running_settings(config, sets, state_file)), query)
    if as_json:
        print_json(rows)
    else:
        _print(rows, list(dict.fromkeys(query.by)))


def parse_day(text: str | None, *, is_end: bool = False) -> datetime.date | None:
    """A day, or the first or the last of a month. Raises typer.BadParameter."""
    if text is None:
        return None
    try:
        month = _MONTH.fullmatch(text)
        if month is None:
            return datetime.date.fromisoformat(text)
        first = datetime.date(int(month[1]), int(month[2]), 1)
        if not is_end:
            return first
        return (first + datetime.timedelta(days=31)).replace(day=1) - datetime.timedelta(days=1)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"expected a day such as 2026-03-01, or a month such as 2026-03, got {text!r}"
        ) from None


def _print(rows: list[dict[str, Any]], keys: list[GroupBy]) -> None:
    table = Table(*keys, show_footer=len(rows) > 1)
    table.columns[0].footer = "all"
    totals = {name: sum(row[name] for row in rows) for name in COUNTS}
    for name in COUNTS:
        table.add_column(_TITLES.get(name, name), _cell(name, totals), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(printable(str(row[key.value])) for key in keys), *(_cell(name, row) for name in COUNTS))
    table_console().print(table, markup=False)


def _cell(name: str, row: dict[str, Any]) -> str:
    """A count; how many tokens were cached as a share of the prompts'."""
    if name == "cached_tokens":
        return f"{100 * row[name] / row['prompt_tokens']:.1f} %" if row["prompt_tokens"] else ""
    return f"{row[name]:,}"
