"""`python -m tests.chaos --minutes 10 --seed 7`: rounds of faults; on failure what was wrong, and the history of it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import tempfile
from pathlib import Path

from tests.chaos.history import Kind
from tests.chaos.run import Verdict, run

EVENTS_SHOWN_MAX = 200


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="stratakv-chaos-") as directory:
        verdict = asyncio.run(run(Path(directory), options.seed, minutes=options.minutes))
    return report(verdict)


def report(verdict: Verdict) -> int:
    """Print what happened; the exit status."""
    history = verdict.history
    counts = ", ".join(f"{history.count(kind)} {kind}" for kind in Kind)
    print(f"{verdict.rounds} rounds in {history.now():.0f} s: {counts}")
    for violation in verdict.violations:
        print(f"VIOLATION {violation}")
        for event in history.of(violation.partition(":")[0])[-EVENTS_SHOWN_MAX:]:
            print(f"    {event}")
    return 1 if verdict.violations else 0


if __name__ == "__main__":
    sys.exit(main())
