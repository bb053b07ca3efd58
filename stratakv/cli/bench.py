"""`stratakv bench NAME`: runs one of the benchmarks, with its own options."""

from __future__ import annotations

import importlib.util
import pkgutil
import runpy
import sys
from typing import Annotated

import typer

from stratakv.errors import SetupError

PACKAGE = "benchmarks"
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which one; without a name they are listed.")] = None,
) -> None:
    """Run a benchmark; its last line of output is one JSON object if --json follows its name."""
    known = _names()
    if name is None:
        print("\n".join(known))
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
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name for module in found if not module.name.startswith("_") and not module.ispkg)
