"""Options that many commands share, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stratakv.config import load_settings
from stratakv.errors import SetupError
from stratakv.settings import Settings

PIPE_WIDTH_CHARS = 1000
"""Of tables that go into a file or a pipe: there a row is one line, for grep and its like."""

ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
StateFileOption = Annotated[
    Path | None,
    typer.Option(
        "--state-file", metavar="FILE", help="State file of a `stratakv up`; by default up.json in the data directory."
    ),
]
DatabaseOption = Annotated[
    str | None, typer.Option("--database", metavar="URL", help="PostgreSQL URL instead of STRATAKV_DATABASE_URL.")
]


def read_settings(
    config: Path | None = None, sets: list[str] | None = None, flags: Mapping[tuple[str, str], object] | None = None
) -> Settings:
    """Settings from all sources; flags that are None were not given. Raises SetupError."""
    overrides: dict[tuple[str, str], str] = {}
    for item in sets or ():
        place, separator, value = item.partition("=")
        section, dot, key = place.partition(".")
        if not separator or not dot:
            raise SetupError(f"--set {item}: expected SECTION.KEY=VALUE, such as worker.dtype=fp32")
        overrides[section, key] = value
    overrides |= {place: str(value) for place, value in (flags or {}).items() if value is not None}
    return load_settings(overrides, config_file=config)


def running_settings(config: Path | None, sets: list[str] | None, state_file: Path | None) -> Settings:
    """Settings that reach the `stratakv up` of this state file, by default of the data directory; `--set` goes before them.

    Where none runs they are the configured ones. Raises SetupError, also if a file was named and none runs.
    """
    from stratakv.up.state import FILE_NAME, running_state

    settings = read_settings(config, sets)
    state = running_state(state_file or settings.up.data_dir.expanduser() / FILE_NAME)
    if state is None:
        if state_file is not None:
            raise SetupError(
                f"--state-file {state_file}: no running `stratakv up` wrote it.",
                hint="Name the file that `stratakv up` shows as its state, or leave the option out.",
            )
        return settings
    told = [f"{name}={text}" for name, text in state["settings"].items()]
    return read_settings(config, [*told, *(sets or ())])


def database_url(given: str | None, settings: Settings) -> str:
    """The database to work on. Raises SetupError if none is named."""
    url = given or settings.database.url
    if url is None:
        raise SetupError(
            "No database is named.",
            hint="Give --database postgresql://user:password@host/name, or set STRATAKV_DATABASE_URL.",
        )
    return url


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, default=str))


def printable(text: str) -> str:
    """With what would steer a terminal, or turn the line's direction, as escapes; it may come from others."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def table_console() -> Console:
    """Where tables are printed: they fit into a terminal, and are as wide as they need to be anywhere else."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH_CHARS)
