"""`stratakv bench NAME`: runs one of the benchmarks, with its own options."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from stratakv.cli.serve import HELP_FLAGS
from stratakv.errors import SetupError

PACKAGE = "benchmarks"
_RUNNABLE = 'if __name__ == "__main__":'


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which one; without a name they are listed.")] = None,
) -> None:
    """Run a benchmark; its last line of output is one JSON object if --json follows its name."""
    known = _names()
    if name is None or name in HELP_FLAGS:
        print(context.get_help() if name else "\n".join(known))
        return
    module = name.replace("-", "_")
    if module not in known:
        raise SetupError(f"There is no benchmark {name!r}.", hint=f"There are: {', '.join(known) or 'none installed'}.")
    sys.argv = [f"stratakv bench {name}", *context.args]
    runpy.run_module(f"{PACKAGE}.{module}", run_name="__main__", alter_sys=False)


def _names() -> list[str]:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return []
    directories = [Path(place) for place in spec.submodule_search_locations]
    modules = [path for directory in directories for path in directory.glob("*.py")]
    return sorted(path.stem for path in modules if _RUNNABLE in path.read_text())
