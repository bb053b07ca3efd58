"""`stratakv up`: everything on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratakv.cli.options import ConfigOption, SetOption, read_settings
from stratakv.up.ports import PortChoice


def up(
    ports: Annotated[PortChoice, typer.Option(help="auto takes any free ports.")] = PortChoice.DEFAULT,
    state_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write URLs and process ids here while running.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="What must outlive a restart, and logs.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to serve.")] = None,
    daemons: Annotated[int | None, typer.Option(min=0, help="Memory-pool daemons.")] = None,
    prefill_workers: Annotated[int | None, typer.Option(min=0, help="Workers for prefill.")] = None,
    decode_workers: Annotated[int | None, typer.Option(min=0, help="Workers for decode.")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Run everything on this machine until Ctrl-C: database, meta server, memory pool, workers, DB node."""
    flags: dict[tuple[str, str], object] = {
        ("up", "data_dir"): data_dir,
        ("model", "name"): model,
        ("up", "daemons"): daemons,
        ("up", "prefill_workers"): prefill_workers,
        ("up", "decode_workers"): decode_workers,
    }
    from stratakv.up.run import run_up

    run_up(read_settings(config, sets, flags), ports, state_file)
