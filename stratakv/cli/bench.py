"""`stratakv bench NAME`: runs one of the benchmarks, with its own options.

A benchmark is a module whose docstring begins with its name; the others in the package are parts of them.
"""

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


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which one; without a name they are listed.")] = None,
) -> None:
    """Run a benchmark; its last line of output is one JSON object if --json follows its name."""
    known = _benchmarks()
    if name is None or name in HELP_FLAGS:
        print(context.get_help() if name else "\n".join(f"{each:16} {what}" for each, what in known.items()))
        return
    module = name.replace("-", "_")
    if module not in known:
        raise SetupError(f"There is no benchmark {name!r}.", hint=f"There are: {', '.join(known) or 'none installed'}.")
    sys.argv = [f"stratakv bench {name}", *context.args]
    runpy.run_module(f"{PACKAGE}.{module}", run_name="__main__", alter_sys=False)


def _benchmarks() -> dict[str, str]:
    """What each of them measures, by name."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return {}
    found = {}
    for path in sorted(path for directory in spec.submodule_search_locations for path in Path(directory).glob("*.py")):
        opening = f'"""{path.stem}: '
        first_line = path.read_text().partition("\n")[0]
        if first_line.startswith(opening):
            found[path.stem] = first_line.removeprefix(opening).strip('"')
    return found
