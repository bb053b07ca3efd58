"""`stratakv meta leader`: who leads, how it is, and let another one."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from stratakv.cli.meta.client import ServerOption, admin_client
from stratakv.cli.meta.shown import done
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, StateFileOption, print_json

app = typer.Typer(help="Who leads, and let another one lead.")
EXIT_NOT_HEALTHY = 1


@app.callback(invoke_without_command=True)
def leader(
    context: typer.Context,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Who leads, and how the meta server that is asked is. Exits 1 if it is not well."""
    if context.invoked_subcommand is not None:
        return
    client = admin_client(server, config, sets, state_file)
    found: dict[str, Any] = {**client.call("getManagerClusterInfo"), **client.call("checkHealth")}
    found |= client.call("getLeaderElectorConfig")
    if as_json:
        print_json(found)
    else:
        _print(found)
    if not found["is_health"]:
        raise typer.Exit(EXIT_NOT_HEALTHY)


def _print(found: dict[str, Any]) -> None:
    print(f"leader      {found['leader_node_id'] or 'nobody'}")
    role = "leads" if found["is_leader"] else "stands by"
    print(f"asked       {found['self_node_id']}, which {role} and is {'well' if found['is_health'] else 'not well'}")
    if found["is_leader"]:
        left_s = int(found["self_leader_expiration_time"]) / 1000 - time.time()
        print(f"lease       {left_s:.1f} s, renewed before it ends")
    print(f"demoted     it lets the others try for {int(found['campaign_delay_time_ms']) / 1000:g} s")


@app.command("demote")
def demote(
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """The leader gives up its lease."""
    admin_client(server, config, sets, state_file).call("leaderDemote")
    done(as_json, "the leader has given up its lease", demoted=True)


@app.command("delay")
def delay(
    seconds: Annotated[float, typer.Argument(min=0, help="How long a demoted leader lets the others try.")],
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """How long the meta server that is asked, demoted, does not try to lead; until its next start."""
    client = admin_client(server, config, sets, state_file)
    client.call("updateLeaderElectorConfig", campaign_delay_time_ms=round(seconds * 1000))
    done(as_json, f"demoted, it lets the others try for {seconds:g} s", campaign_delay_s=seconds)
