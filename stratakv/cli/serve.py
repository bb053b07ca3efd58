"""`stratakv serve`: becomes one of the services."""

from __future__ import annotations

import enum
import os
import sys
from typing import Annotated

import typer

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


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
    context: typer.Context, service: Annotated[ServiceName, typer.Argument(help="Which service to run.")]
) -> None:
    """Run one service. What follows its name is passed on: `stratakv serve worker --help`."""
    os.execv(sys.executable, [sys.executable, "-m", _MODULES[service], *context.args])
