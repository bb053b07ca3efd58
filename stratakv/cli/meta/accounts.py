"""`stratakv meta accounts`: who may call the KVCM API by name and password."""

from __future__ import annotations

import enum
import sys
from typing import Annotated

import typer

from stratakv.cli.meta.client import ServerOption, admin_client
from stratakv.cli.meta.shown import done, show
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, StateFileOption

app = typer.Typer(help="Who may call the KVCM API by name and password.")


class Role(enum.StrEnum):
    """Of an account: users have the calls of MetaService, administrators all."""

    USER = "user"
    ADMIN = "admin"


@app.callback(invoke_without_command=True)
def accounts(
    context: typer.Context,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """All accounts."""
    if context.invoked_subcommand is not None:
        return
    found = admin_client(server, config, sets, state_file).call("listAccount")["accounts"]
    rows = [(one["user_name"], one["role"].removeprefix("ROLE_").lower()) for one in found]
    show(as_json, found, ("account", "role"), rows)


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    role: Annotated[Role, typer.Option(help="Users have the calls of MetaService, administrators all.")] = Role.USER,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add an account; its password is asked for, or read from standard input."""
    password = typer.prompt("Password", hide_input=True, confirmation_prompt=True) if sys.stdin.isatty() else _read()
    client = admin_client(server, config, sets, state_file)
    client.call("addAccount", user_name=name, password=password, role=f"ROLE_{role.upper()}")
    done(as_json, f"account {name} is added", user_name=name, role=role.value)


@app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """It is let in no longer."""
    admin_client(server, config, sets, state_file).call("deleteAccount", user_name=name)
    done(as_json, f"account {name} is removed", removed=name)


def _read() -> str:
    return sys.stdin.readline().rstrip("\r\n")
