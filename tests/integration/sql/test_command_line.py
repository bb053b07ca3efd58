"""`stratakv sql`: statements with their progress on a terminal, JSON for programs, and nothing else where nobody looks."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys

from stratakv.cli.sql_progress import facts
from tests.integration.sql.harness import FrontThread
from tests.support import eventually

TIMEOUT_S = 60
SLOW = """SELECT count(infer('p' || i, options => '{"delay_s": 0.3}')) AS number FROM generate_series(1, 300) i"""


def command(front: FrontThread, database: str, *arguments: str) -> list[str]:
    own = ("-d", database, "--set", f"sql.port={front.settings.port}", "--set", "up.data_dir=/nonexistent")
    return [sys.executable, "-m", "stratakv.cli", "sql", *own, *arguments]


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STRATAKV_")}
    return inherited | {"TERM": "xterm", "COLUMNS": "120"}


def read_all(master: int) -> str:
    """What a process wrote on its terminal, until it has ended."""
    written = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        written += data
    os.close(master)
    return written.decode(errors="replace")


def test_a_terminal_shows_progress_and_then_the_table(front: FrontThread, database: str) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command(front, database, "-c", SLOW), stdin=slave, stdout=slave, stderr=slave, env=environment()
    )
    os.close(slave)
    shown = read_all(master)
    assert process.wait(TIMEOUT_S) == 0
    assert "infer()" in shown
    assert "/300" in shown
    assert "tokens/s" in shown
    assert "number" in shown.rpartition("infer()")[2]
    eventually(lambda: all(session.console is None for session in front.front.relay.sessions))


def test_json_is_only_the_rows(front: FrontThread, database: str) -> None:
    done = subprocess.run(
        command(
            front, database, "--json", "-c", "SELECT 1 AS a, infer('ab') AS b, NULL AS c, now()::date IS NULL AS d"
        ),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(),
        check=True,
    )
    assert json.loads(done.stdout) == [{"a": 1, "b": "ba", "c": None, "d": False}]
    assert done.stderr == ""


def test_a_statement_that_fails_is_told_and_ends_with_status_1(front: FrontThread, database: str) -> None:
    for option in ("--json", "--progress"):
        done = subprocess.run(
            command(front, database, option, "-c", "SELECT no_such_column", "-c", "SELECT 2"),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment(),
            check=False,
        )
        assert done.returncode == 1
        assert "no_such_column" in done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_options_that_do_not_go_together_are_refused(front: FrontThread, database: str) -> None:
    for arguments in (["--json"], ["--json", "-c", "\\d"], ["--progress", "--csv", "-c", "SELECT 1"]):
        done = subprocess.run(
            command(front, database, *arguments),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment(),
            check=False,
        )
        assert done.returncode == 2, done.stderr


def test_ctrl_c_cancels_the_statement(front: FrontThread, database: str) -> None:
    endless = """SELECT infer('p', options => '{"delay_s": 60}')"""
    cancelled = front.model.cancelled
    process = subprocess.Popen(
        command(front, database, "--progress", "-c", endless), stderr=subprocess.PIPE, text=True, env=environment()
    )
    eventually(lambda: front.model.running, timeout_s=TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130
    eventually(lambda: front.model.cancelled > cancelled and not front.model.running)
    assert process.stderr is not None
    assert "Cancelled" in process.stderr.read()
    process.stderr.close()


def test_rates_are_told_in_tokens() -> None:
    row = {"prompt_tokens": 900, "generated_tokens": 100, "cached_tokens": 450}
    assert facts(row, 2.0) == "500 tokens/s, 50 % cached"
    assert facts({"prompt_tokens": 0, "generated_tokens": 0, "cached_tokens": 0}, 1.0) == "0 tokens/s"
