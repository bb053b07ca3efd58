"""`stratakv meta instances`: the deployments that are registered."""

from __future__ import annotations

from typing import Annotated

import typer

from stratakv.cli.cache.common import show_bytes
from stratakv.cli.meta.client import ServerOption, admin_client
from stratakv.cli.meta.shown import done, show
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, StateFileOption, print_json

app = typer.Typer(help="The deployments that are registered.")
InstanceArgument = Annotated[str, typer.Argument(metavar="ID")]


@app.callback(invoke_without_command=True)
def instances(
    context: typer.Context,
    group: Annotated[str, typer.Option("--group", metavar="NAME", help="Only this group's.")] = "",
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Those that are registered."""
    if context.invoked_subcommand is not None:
        return
    client = admin_client(server, config, sets, state_file)
    found = client.call("listInstanceInfo", instance_group_name=group)["instance_info"]
    rows = [
        (
            one["instance_id"],
            one["instance_group_name"],
            one.get("model_deployment", {}).get("model_name", ""),
            str(one["block_size"]),
            show_bytes(sum(int(spec["size"]) for spec in one["location_spec_infos"])),
            ", ".join(spec["name"] for spec in one["location_spec_infos"]),
        )
        for one in found
    ]
    show(as_json, found, ("instance", "group", "model", "tokens a block", "bytes a block", "specs"), rows)


@app.command("show")
def show_instance(
    instance: InstanceArgument,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What was registered; always JSON."""
    del as_json
    client = admin_client(server, config, sets, state_file)
    print_json(client.call("getInstanceInfo", instance_id=instance)["instance_info"])


@app.command("remove")
def remove(
    instance: InstanceArgument,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """With all its blocks and their files."""
    admin_client(server, config, sets, state_file).call("removeInstance", instance_id=instance)
    done(as_json, f"instance {instance} is removed; its files are being deleted", removed=instance)
