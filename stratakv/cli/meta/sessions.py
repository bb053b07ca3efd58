"""`stratakv meta sessions`: the write sessions that are open."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from stratakv.cli.cache.common import show_bytes
from stratakv.cli.meta.client import ServerOption, admin_client
from stratakv.cli.meta.shown import show
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, StateFileOption


def sessions(
    instance: Annotated[str, typer.Option("--instance", metavar="ID", help="Only this instance's.")] = "",
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write sessions that are neither finished nor over, the first to end first."""
    found = admin_client(server, config, sets, state_file).call("listWriteSessions", instance_id=instance)
    rows = [
        (
            one["write_session_id"],
            one["instance_id"],
            one["storage_unique_name"],
            one["block_count"],
            show_bytes(int(one["size_bytes"])),
            f"{time.time() - int(one['created_s']):.0f} s",
            f"{one['seconds_left']:.0f} s",
        )
        for one in found["sessions"]
    ]
    show(as_json, found, ("session", "instance", "storage", "blocks", "size", "age", "time left"), rows)
