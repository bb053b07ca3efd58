"""pgbench in its three query modes: it must end well, fail no transaction, and leave its books balanced."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import psycopg

from stratakv.postgres import find_binaries
from stratakv.settings import PostgresSettings
from tests.compat.outcomes import Outcome, Result, Results
from tests.compat.target import Target

MODES = ("simple", "extended", "prepared")
SCRIPTS = ("tpcb-like", "simple-update", "select-only")
CLIENTS = 8
TRANSACTIONS = 250
"""Of each client."""
PIPELINE_STATEMENTS = 50
TIMEOUT_S = 120
_DONE = f"number of transactions actually processed: {CLIENTS * TRANSACTIONS}/{CLIENTS * TRANSACTIONS}"
_NONE_FAILED = re.compile(r"number of failed transactions: 0 ")
_BALANCED = """
SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
"""


def run(target: Target, directory: Path) -> Results:
    pipeline = directory / "pipeline.sql"
    statement = "SELECT abalance FROM pgbench_accounts WHERE aid = 1;"
    pipeline.write_text("\n".join(["\\startpipeline", *[statement] * PIPELINE_STATEMENTS, "\\endpipeline"]))
    found = {"initialise": _pgbench(target, ["-i", "-q"])}
    for mode in MODES:
        for script in SCRIPTS:
            found[f"{script} {mode}"] = _measured(target, mode, ["-b", script])
            found[f"{script} {mode} balance"] = _balance(target)
        if mode != "simple":
            found[f"pipeline {mode}"] = _measured(target, mode, ["-f", str(pipeline)])
    return found


def _measured(target: Target, mode: str, script: list[str]) -> Result:
    flags = ["-n", "-M", mode, "-c", str(CLIENTS), "-j", "2", "-t", str(TRANSACTIONS)]
    return _pgbench(target, [*flags, *script], _DONE, _NONE_FAILED)


def _pgbench(target: Target, arguments: list[str], wanted: str = "", pattern: re.Pattern[str] | None = None) -> Result:
    program = find_binaries(PostgresSettings().bin).program("pgbench")
    command = [program, "-h", target.host, "-p", str(target.port), "-U", target.user, *arguments, target.database]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    well = done.returncode == 0 and wanted in done.stdout and (pattern is None or pattern.search(done.stdout))
    return Result(Outcome.PASSED) if well else Result(Outcome.FAILED, message=done.stderr[-400:])


def _balance(target: Target) -> Result:
    with psycopg.connect(target.url()) as connection:
        row = connection.execute(_BALANCED).fetchone()
    return Result(Outcome.PASSED if row == (True,) else Outcome.FAILED)
