"""`stratakv serve`: becomes one of the services."""

from __future__ import annotations

import enum
import os
import sys
from typing import Annotated

import typer

from stratakv.errors import SetupError

PASS_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}
"""Everything after the first word is for the program that is run, --help too."""
HELP_FLAGS = ("-h", "--help")


class ServiceName(enum.StrEnum):
    """The services by the names operators use."""

    DBNODE = "dbnode"
    META = "meta"
    DMP = "dmp"
    WORKER = "worker"


_MODULES = {
    ServiceName.DBNODE: "dbnode",
    ServiceName.META: "meta_server",
    ServiceName.DMP: "dmp",
    ServiceName.WORKER: "workers",
}


def serve(
    context: typer.Context,
    service: Annotated[
        str | None, typer.Argument(metavar="dbnode|meta|dmp|worker", help="Which service to run.")
    ] = None,
) -> None:
    """Run one service. What follows its name is passed on: `stratakv serve worker --help`."""
    if service is None or service in HELP_FLAGS:
        print(context.get_help())
        return
    if service not in set(ServiceName):
        raise SetupError(f"There is no service {service!r}.", hint=f"There are: {', '.join(ServiceName)}.")
    os.execv(sys.executable, [sys.executable, "-m", _MODULES[ServiceName(service)], *context.args])
