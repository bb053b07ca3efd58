"""The progress bar of a model being fetched and converted."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stratakv.models.store import pull

_BYTES_FROM = 10_000
"""Smaller totals count tensors or steps, larger ones bytes."""


def pull_with_progress(name: str, cache_dir: Path) -> Path:
    """Fetch the model if it is missing; draws on standard error. Raises SetupError."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=None, amount="")
        shown_stage = ""

        def report(stage: str, done: int, total: int) -> None:
            nonlocal shown_stage
            if stage != shown_stage:  # the time left starts anew with each stage
                progress.reset(task, description=f"{name}: {stage}", total=None, amount="")
                shown_stage = stage
            progress.update(task, completed=done, total=total or None, amount=_amount(done, total))

        return pull(name, cache_dir.expanduser(), report)


def _amount(done: int, total: int) -> str:
    if total == 0:
        return ""
    if total < _BYTES_FROM:
        return f"{done}/{total}"
    return f"{decimal(done)}/{decimal(total)}"
