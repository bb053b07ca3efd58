"""Runs suites that others wrote for PostgreSQL, directly and through the DB node, and compares how each test ended.

    python -m tests.compat [asyncpg] [sqlalchemy-psycopg] [sqlalchemy-asyncpg] [pg_regress] [pgbench]

Fails if a test ends otherwise through the DB node and `known_differences.toml` does not say why. Results stay in the cache.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.compat import asyncpg_suite, pgbench_suite, regress_suite, sqlalchemy_suite
from tests.compat.outcomes import Difference, Results, compare, known_differences, totals
from tests.compat.sources import Missing, cache
from tests.compat.target import Side, Target, target

EXIT_SETUP = 2


@dataclass(frozen=True, slots=True)
class Suite:
    """How one suite is run."""

    run: Callable[[Target, Path], Results]
    bin_directory: Path | None = None
    """Of the server it needs; None for the embedded one."""


SUITES = {
    "pgbench": Suite(pgbench_suite.run),
    "asyncpg": Suite(asyncpg_suite.run),
    "sqlalchemy-psycopg": Suite(sqlalchemy_suite.run_psycopg),
    "sqlalchemy-asyncpg": Suite(sqlalchemy_suite.run_asyncpg),
    "pg_regress": Suite(regress_suite.run_suite, regress_suite.BIN),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"some of {', '.join(SUITES)}; all by default")
    names = parser.parse_args().suites or list(SUITES)
    if unknown := set(names) - SUITES.keys():
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    unexplained, missing = 0, 0
    for name in names:
        try:
            differences = run_both(name, SUITES[name])
        except Missing as error:
            print(f"{name}: not run. {error}", file=sys.stderr)
            missing += 1
            continue
        unexplained += sum(not difference.reason for difference in differences)
    if unexplained:
        print(f"\n{unexplained} unexplained differences", file=sys.stderr)
        return 1
    return EXIT_SETUP if missing else 0


def run_both(name: str, suite: Suite) -> list[Difference]:
    """Run it on both sides and print what came out. Raises Missing."""
    results: dict[Side, Results] = {}
    for side in Side:
        directory = cache() / "runs" / name / side
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        started_s = time.monotonic()
        if suite.bin_directory is not None and not suite.bin_directory.exists():
            raise Missing(f"{suite.bin_directory} is not there. apt-get install postgresql")
        with target(side, suite.bin_directory) as where:
            results[side] = suite.run(where, directory)
        print(f"{name} {side}: {totals(results[side])} ({time.monotonic() - started_s:.0f} s)", flush=True)
    differences = compare(name, results[Side.DIRECT], results[Side.GATEWAY], known_differences())
    for difference in differences:
        _print_difference(difference)
    return differences


def _print_difference(difference: Difference) -> None:
    print(
        f"  {difference.test}: {difference.direct.outcome} directly, {difference.gateway.outcome} through the DB node"
    )
    if difference.reason:
        print(f"    known: {difference.reason}")
    elif difference.gateway.message or difference.direct.message:
        print(f"    UNEXPLAINED: {(difference.gateway.message or difference.direct.message)[:300]}")
    else:
        print("    UNEXPLAINED")


if __name__ == "__main__":
    sys.exit(main())
