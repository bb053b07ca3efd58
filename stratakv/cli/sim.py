"""`stratakv sim`: becomes the simulation of a fleet, which is a part of the DB node."""

from __future__ import annotations

import os
import sys

import typer

MODULE = "dbnode.simulation"


def sim(context: typer.Context) -> None:
    """Replay a trace of requests on a simulated fleet of workers: `stratakv sim --help`."""
    os.execv(sys.executable, [sys.executable, "-m", MODULE, *context.args])
