"""What the commands of tenants, keys and quotas share: the way to the metadata, and options with lists."""

from __future__ import annotations

import ipaddress
import os
import pwd
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stratakv.cli.options import database_url, running_settings
from stratakv.tenancy.values import Permission

if TYPE_CHECKING:
    from stratakv.tenancy.administration import Administration

ANY = "any"
"""Takes a restriction away."""
PermissionsOption = Annotated[
    list[Permission] | None, typer.Option("--permission", help="What it may do; repeatable, all of them together.")
]
ModelsOption = Annotated[
    list[str] | None, typer.Option("--model", metavar="NAME", help="A model it may use; repeatable. `any`: all.")
]
NetworksOption = Annotated[
    list[str] | None,
    typer.Option("--network", metavar="CIDR", help="Where its REST clients may be; repeatable. `any`: everywhere."),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]


def administration(
    database: str | None, config: Path | None, sets: list[str] | None, state_file: Path | None
) -> Administration:
    """Of the metadata that is named, or of the `stratakv up` that runs. Raises SetupError."""
    from stratakv.tenancy.administration import Administration

    return Administration(database_url(database, running_settings(config, sets, state_file)), actor())


def actor() -> str:
    """Who runs the command, for the log of changes: as the system knows it, whatever the environment says."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def list_or_any(values: Sequence[str] | None) -> list[str] | None:
    """What an option that restricts was given; `any` is None. Raises typer.BadParameter."""
    if values is None or list(values) == [ANY]:
        return None
    if ANY in values:
        raise typer.BadParameter(f"`{ANY}` takes the restriction away, and stands alone")
    return list(values)


def demand_changes(changes: Mapping[str, object]) -> None:
    """Raises typer.BadParameter if nothing was named."""
    if not changes:
        raise typer.BadParameter("nothing is named that is to be changed; --help lists what can be")


def checked_networks(values: Sequence[str] | None) -> list[str] | None:
    """The same, of networks. Raises typer.BadParameter."""
    networks = list_or_any(values)
    for network in networks or ():
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise typer.BadParameter(f"expected a network such as 10.0.0.0/8: {error}") from None
    return networks


def shown_list(values: Sequence[str] | None) -> str:
    return ANY if values is None else ", ".join(values) or "none"


def shown_time(value: Any) -> str:
    return value.astimezone().strftime("%Y-%m-%d %H:%M") if isinstance(value, datetime) else ""
