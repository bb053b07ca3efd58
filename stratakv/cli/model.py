"""`stratakv model`: fetch models and list them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from stratakv.cli.options import ConfigOption, JsonOption, SetOption, print_json, read_settings, table_console

app = typer.Typer(help="Models: pull, list.", no_args_is_help=True)


@app.command("pull")
def pull_model(
    name: Annotated[str | None, typer.Argument(help="smollm2-135m, hf://org/name or a local directory.")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model into the cache directory; does nothing if it is there."""
    from stratakv.models.progress import pull_with_progress

    settings = read_settings(config, sets)
    wanted = name or settings.model.name
    directory = pull_with_progress(wanted, settings.model.cache_dir)
    if as_json:
        print_json({"model": wanted, "directory": directory})
    else:
        print(f"{wanted} is in {directory}")


@app.command("list")
def list_pulled(config: ConfigOption = None, sets: SetOption = None, as_json: JsonOption = False) -> None:
    """Models in the cache directory."""
    from stratakv.models import list_models, resolve

    settings = read_settings(config, sets)
    cache_dir = settings.model.cache_dir.expanduser()
    found = {name: resolve(name, cache_dir) for name in list_models(cache_dir)}
    if as_json:
        print_json([{"model": name, "directory": directory} for name, directory in found.items()])
        return
    table = Table("model", "size", "directory")
    for name, directory in found.items():
        size_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        table.add_row(name, f"{size_bytes / 1e6:,.0f} MB", str(directory))
    table_console().print(table)
