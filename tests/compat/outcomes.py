"""How the tests of a suite ended, directly and through the gateway, and which differences are known."""

from __future__ import annotations

import enum
import fnmatch
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KNOWN_FILE = Path(__file__).parent / "known_differences.toml"


class Outcome(enum.StrEnum):
    """How one test ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    ABSENT = "absent"
    """It ran on one side only."""


@dataclass(frozen=True, slots=True)
class Result:
    """One test on one side. Results with unlike `output` differ, whatever their outcome."""

    outcome: Outcome
    output: str = ""
    """What PostgreSQL's regression tests printed; empty for suites that only pass or fail."""
    message: str = ""
    """Why it failed."""


Results = Mapping[str, Result]


@dataclass(frozen=True, slots=True)
class Difference:
    """One test that ended otherwise through the gateway, in every run."""

    test: str
    direct: Result
    gateway: Result
    reason: str
    """Empty if nobody has explained it."""


@dataclass(frozen=True, slots=True)
class Known:
    """An explained difference, from the committed file."""

    suite: str
    test: str
    """A name, or a pattern with `*`."""
    reason: str


def known_differences(file: Path = KNOWN_FILE) -> list[Known]:
    """Raises KeyError, tomllib.TOMLDecodeError."""
    entries = tomllib.loads(file.read_text()).get("difference", [])
    return [Known(entry["suite"], entry["test"], entry["reason"]) for entry in entries]


def compare(suite: str, direct: Sequence[Results], gateway: Sequence[Results], known: list[Known]) -> list[Difference]:
    """Tests of which no run on one side ended as some run on the other did, in the order of their names.

    So a test that ends now so, now otherwise on a server that is reached directly makes no difference.
    """
    absent = Result(Outcome.ABSENT)
    found = []
    for test in sorted({name for results in (*direct, *gateway) for name in results}):
        one = [results.get(test, absent) for results in direct]
        other = [results.get(test, absent) for results in gateway]
        if {_seen(result) for result in one}.isdisjoint({_seen(result) for result in other}):
            reasons = [k.reason for k in known if k.suite == suite and fnmatch.fnmatchcase(test, k.test)]
            found.append(Difference(test, one[-1], other[-1], reasons[0] if reasons else ""))
    return found


def _seen(result: Result) -> tuple[Outcome, str]:
    return result.outcome, result.output


def totals(results: Results) -> str:
    """`259 passed, 6 failed, 40 skipped`."""
    counts = Counter(result.outcome for result in results.values())
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome if counts[outcome]) or "no tests"
