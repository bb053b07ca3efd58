"""`stratakv meta storages`: where clients of the KVCM API write."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from stratakv.cli.cache.common import show_bytes
from stratakv.cli.meta.client import ServerOption, admin_client
from stratakv.cli.meta.shown import done, show
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, StateFileOption

app = typer.Typer(help="Where clients of the KVCM API write.")
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]
_KINDS = {"nfs": "file", "threefs": "3fs", "mooncake": "mooncake"}


class Kind(enum.StrEnum):
    """Of a storage below a directory."""

    FILE = "file"
    THREEFS = "3fs"


@app.callback(invoke_without_command=True)
def storages(
    context: typer.Context,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """All storages, and how each was when it was last looked at."""
    if context.invoked_subcommand is not None:
        return
    found = admin_client(server, config, sets, state_file).call("listStorageStates")["storages"]
    columns = ("storage", "kind", "where", "enabled", "health", "in use", "blocks", "bytes", "deletions waiting")
    show(as_json, found, columns, [_row(one) for one in found])


def _row(state: dict[str, Any]) -> tuple[str, ...]:
    config = state["storage"]
    kind = next((name for name in _KINDS if name in config), "")
    spec = config.get(kind, {})
    where = spec.get("root_path") or spec.get("master_service_entry")
    where = where or f"{spec.get('mountpoint', '')}/{spec.get('root_dir', '')}"
    health = state["health"].lower().replace("_", " ")
    return (
        config["global_unique_name"],
        _KINDS.get(kind, kind),
        where,
        "yes" if state["is_enabled"] else "no",
        f"{health}: {state['detail']}" if state["detail"] else health,
        f"{100 * state['used_share']:.0f} %" if state["used_share"] >= 0 else "",
        state["key_count"],
        show_bytes(int(state["used_bytes"])),
        state["deletions_waiting"],
    )


@app.command("add")
def add(
    name: NameArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Its root, the same for all clients.")],
    kind: Annotated[Kind, typer.Option(help="What clients are told it is.")] = Kind.FILE,
    keys_per_file: Annotated[int, typer.Option(min=1, help="Blocks in one file.")] = 1,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Make and delete a file there first.")] = True,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a storage below a directory that the meta server and its clients have at the same path."""
    root = str(directory.absolute())
    spec: dict[str, Any] = {"root_path": root} if kind is Kind.FILE else {"mountpoint": root}
    spec["key_count_per_file"] = keys_per_file
    storage = {
        "global_unique_name": name,
        "nfs" if kind is Kind.FILE else "threefs": spec,
        "check_storage_available_when_open": check,
    }
    admin_client(server, config, sets, state_file).call("addStorage", storage=storage)
    done(as_json, f"storage {name} is added; groups name it among their candidates to use it", storage=storage)


@app.command("enable")
def enable(
    name: NameArgument,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """It takes new blocks."""
    admin_client(server, config, sets, state_file).call("enableStorage", storage_unique_name=name)
    done(as_json, f"storage {name} takes new blocks", enabled=name)


@app.command("disable")
def disable(
    name: NameArgument,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """It takes no new blocks, and keeps what it has."""
    admin_client(server, config, sets, state_file).call("disableStorage", storage_unique_name=name)
    done(as_json, f"storage {name} takes no new blocks", disabled=name)


@app.command("remove")
def remove(
    name: NameArgument,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """With all its blocks and their files; no group may name it any more."""
    admin_client(server, config, sets, state_file).call("removeStorage", storage_unique_name=name)
    done(as_json, f"storage {name} is removed; its files are being deleted", removed=name)
