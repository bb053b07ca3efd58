"""`stratakv config`: the settings as all sources together give them."""

from __future__ import annotations

import typer
from rich.table import Column, Table

from stratakv.cli.options import ConfigOption, JsonOption, SetOption, print_json, read_settings, table_console
from stratakv.config import options, show_value

app = typer.Typer(help="Configuration: show.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `show` a subcommand although it is the only one."""


@app.command()
def show(config: ConfigOption = None, sets: SetOption = None, as_json: JsonOption = False) -> None:
    """Every setting, its value and its environment variable; secrets are masked."""
    settings = read_settings(config, sets)
    shown = [(o, getattr(getattr(settings, o.section), o.key)) for o in options()]
    if as_json:
        sections: dict[str, dict[str, str | None]] = {}
        for option, value in shown:
            text = None if value is None else show_value(option, value)
            sections.setdefault(option.section, {})[option.key] = text
        print_json(sections)
        return
    table = Table(*(Column(name, overflow="fold") for name in ("setting", "value", "environment", "meaning")))
    for option, value in shown:
        style = "" if value == option.default else "bold"
        text = "" if value is None else show_value(option, value)
        table.add_row(f"{option.section}.{option.key}", text, option.env, option.doc, style=style)
    table_console().print(table, markup=False)
