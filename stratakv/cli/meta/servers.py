"""`stratakv meta servers`: which of them leads, and having another one lead, by the native protocol."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table

from stratakv.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    StateFileOption,
    print_json,
    running_settings,
    table_console,
)
from stratakv.errors import InvalidRequest, Unavailable
from stratakv.settings import Settings
from stratakv.wire import LeaderState

EXIT_NO_LEADER = 1
app = typer.Typer(help="Which meta server leads; have another one lead.")


@app.callback(invoke_without_command=True)
def servers(
    context: typer.Context,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask every meta server who leads. Exits 1 if none of them does."""
    if context.invoked_subcommand is not None:
        return
    states = asyncio.run(_states(running_settings(config, sets, state_file)))
    if as_json:
        print_json({address: _as_dict(state) for address, state in states.items()})
    else:
        _print(states)
    if not any(state is not None and state.is_leader for state in states.values()):
        raise typer.Exit(EXIT_NO_LEADER)


@app.command("demote")
def demote(
    address: Annotated[
        str, typer.Argument(metavar="[HOST:PORT]", help="The leader; needed where there are several shards.")
    ] = "",
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Have the leader give up its lease, for one that stands by to take."""
    demoted = asyncio.run(_demote(running_settings(config, sets, state_file), address))
    print(f"{demoted} no longer leads")


async def _states(settings: Settings) -> dict[str, LeaderState | None]:
    from stratakv.pool.auth import PoolCredentials
    from stratakv.pool.meta_servers import leader_states

    return await leader_states(settings.meta, PoolCredentials.from_settings(settings.pool))


async def _demote(settings: Settings, address: str) -> str:
    from stratakv.pool.auth import PoolCredentials
    from stratakv.pool.meta_servers import demote as demote_server

    leaders = [known for known, state in (await _states(settings)).items() if state is not None and state.is_leader]
    if not leaders:
        raise Unavailable("none of the meta servers leads")
    if address and address not in leaders:
        raise InvalidRequest(f"{address} does not lead; {' and '.join(leaders)} does")
    if not address and len(leaders) > 1:
        raise InvalidRequest(f"there are {len(leaders)} leaders, one of each shard", hint=f"Name one: {leaders[0]}")
    chosen = address or leaders[0]
    await demote_server(settings.meta, chosen, PoolCredentials.from_settings(settings.pool))
    return chosen


def _as_dict(state: LeaderState | None) -> dict[str, Any] | None:
    return msgspec.structs.asdict(state) if state is not None else None


def _print(states: dict[str, LeaderState | None]) -> None:
    table = Table("meta server", "is", "term", "lease left", "take-overs", title="Meta servers")
    for address, state in states.items():
        if state is None:
            table.add_row(address, "no answer", "", "", "")
        elif state.is_leader:
            table.add_row(address, "leading", str(state.term), f"{state.lease_left_s:.1f} s", str(state.take_overs))
        else:
            following = f"standing by for {state.leader}" if state.leader else "standing by"
            table.add_row(address, following, "", "", str(state.take_overs))
    table_console().print(table, markup=False)
