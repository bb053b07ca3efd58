"""Runs a suite that is written for pytest in a process of its own, and reads how its tests ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from tests.compat.outcomes import Outcome, Result
from tests.compat.sources import SuiteFailed

TEST_TIMEOUT_S = 60
SUITE_TIMEOUT_S = 900


def run_pytest(directory: Path, arguments: list[str], environment: dict[str, str]) -> dict[str, Result]:
    """By name of test. Raises SuiteFailed."""
    report = directory / "report.xml"
    report.unlink(missing_ok=True)
    flags = ["-q", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_S}", f"--junitxml={report}", "--tb=short"]
    with (directory / "pytest.log").open("wb") as log, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-m", "pytest", *flags, *arguments],
            cwd=directory,
            env=os.environ | environment,
            stdout=log,
            stderr=log,
            timeout=SUITE_TIMEOUT_S,
            check=False,
        )
    if not report.exists():
        raise SuiteFailed(f"pytest made no report, see {directory / 'pytest.log'}")
    return read_report(report)


def read_report(report: Path) -> dict[str, Result]:
    """Of pytest's `--junitxml`."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        failure = next((entry for tag in ("failure", "error") if (entry := case.find(tag)) is not None), None)
        if failure is not None:
            found[name] = Result(Outcome.FAILED, message=failure.get("message", ""))
        else:
            found[name] = Result(Outcome.PASSED if case.find("skipped") is None else Outcome.SKIPPED)
    return found
