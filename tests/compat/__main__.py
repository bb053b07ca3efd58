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
from tests.compat.sources import Missing, SuiteFailed, cache
from tests.compat.target import Side, Target, target

EXIT_SETUP = 2
RUNS_MAX = 3
"""Of each suite and side: some tests do not end the same each time, whatever they run against."""


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
        except SuiteFailed as error:
            print(f"{name}: {error}", file=sys.stderr)
            unexplained += 1
            continue
        unexplained += sum(not difference.reason for difference in differences)
    if unexplained:
        print(f"\n{unexplained} unexplained differences or failed suites", file=sys.stderr)
        return 1
    return EXIT_SETUP if missing else 0


def run_both(name: str, suite: Suite) -> list[Difference]:
    """Run it on both sides and print what came out; again as long as something unexplained differs.

    Raises Missing, SuiteFailed.
    """
    runs: dict[Side, list[Results]] = {side: [] for side in Side}
    differences: list[Difference] = []
    for _ in range(RUNS_MAX):
        for side in Side:
            runs[side].append(_run_one(name, suite, side))
        differences = compare(name, runs[Side.DIRECT], runs[Side.GATEWAY], known_differences())
        if all(difference.reason for difference in differences):
            break
    for difference in differences:
        _print_difference(difference)
    return differences


def _run_one(name: str, suite: Suite, side: Side) -> Results:
    if suite.bin_directory is not None and not suite.bin_directory.exists():
        raise Missing(f"{suite.bin_directory} is not there: apt-get install postgresql")
    directory = cache() / "runs" / name / side
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    started_s = time.monotonic()
    with target(side, suite.bin_directory) as where:
        results = suite.run(where, directory)
    print(f"{name} {side}: {totals(results)} ({time.monotonic() - started_s:.0f} s)", flush=True)
    return results


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
