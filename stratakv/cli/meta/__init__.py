"""`stratakv meta`: the meta servers, seen and ruled from outside. A file per kind of thing."""

from __future__ import annotations

import typer

from stratakv.cli.meta import leader

app = typer.Typer(help="Look at the meta servers, and rule them.", no_args_is_help=True)
app.add_typer(leader.app, name="leader")


@app.callback()
def meta() -> None:
    """Look at the meta servers, and rule them."""
