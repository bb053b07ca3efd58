"""How far a statement is, drawn on a terminal while it runs: asked of the DB node's admin database on a second connection.

Used by `stratakv sql`. Where that connection cannot be had, or nothing is a terminal, nothing is drawn.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import dict_row
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

POLL_S = 0.25
PATIENCE_S = 0.5
"""A statement that ends sooner is not asked about."""
CLOSE_TIMEOUT_S = 5.0


class ProgressWatch:
    """Asks about the statements of one session, on a connection that is opened when it is needed first."""

    def __init__(self, admin: Mapping[str, str], backend_pid: int, console: Console) -> None:
        self._admin = admin
        self._pid = backend_pid
        self._console = console
        self._connection: psycopg.Connection[dict[str, Any]] | None = None
        self._is_refused = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Draw while the body runs."""
        if not self._console.is_terminal or self._is_refused:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(CLOSE_TIMEOUT_S)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _watch(self, ended: threading.Event) -> None:
        if ended.wait(PATIENCE_S):
            return
        try:
            with _bar(self._console) as bar:
                task = bar.add_task("infer()", total=None, visible=False, facts="")
                started_s = time.monotonic()
                while not ended.is_set():
                    row = self._ask()
                    if row is not None:
                        seconds = time.monotonic() - started_s + PATIENCE_S
                        total = row["prompts_total"] or None
                        done = min(row["prompts_done"], row["prompts_total"])
                        bar.update(task, visible=True, completed=done, total=total, facts=facts(row, seconds))
                    ended.wait(POLL_S)
        except psycopg.Error:
            self._is_refused = True  # no admin database, or not for this role: the statement goes on undrawn

    def _ask(self) -> dict[str, Any] | None:
        """What the DB node says of the statement; None while it asks nothing of the model."""
        if self._connection is None:
            self._connection = psycopg.connect(**self._admin, autocommit=True, row_factory=dict_row)  # type: ignore[arg-type]
        rows = self._connection.execute("SHOW STATEMENTS").fetchall()
        return next((row for row in rows if row["remote_pid"] == self._pid), None)


def facts(row: Mapping[str, Any], seconds: float) -> str:
    """Tokens per second, and the share of prompt tokens that were cached."""
    tokens_per_s = (row["prompt_tokens"] + row["generated_tokens"]) / max(seconds, POLL_S)
    cached = f", {100 * row['cached_tokens'] / row['prompt_tokens']:.0f} % cached" if row["prompt_tokens"] else ""
    return f"{tokens_per_s:,.0f} tokens/s{cached}"


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
