"""`stratakv drain`: take a part out of service without losing what it has."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from stratakv.cli.cache.common import ask_meta, parse_seconds, show_bytes
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, StateFileOption, print_json, running_settings
from stratakv.errors import Unavailable
from stratakv.wire import DrainProgress, SetDraining

if TYPE_CHECKING:
    from stratakv.pool.shards import PoolClient

app = typer.Typer(help="Take a part out of service without losing what it has.", no_args_is_help=True)
POLL_S = 0.5
EXIT_NOT_DONE = 1


@app.callback()
def drain() -> None:
    """Take a part out of service without losing what it has."""


@app.command("dmp")
def dmp(
    node: Annotated[str, typer.Argument(metavar="NODE", help="The daemon; its disk is drained with it.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let it take pages again.")] = False,
    whole: Annotated[
        bool, typer.Option("--all", help="Also pages that nobody has read since they were written.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until nothing more moves; exits 1 if that takes too long.")
    ] = False,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Longest wait.")] = "1h",
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move a daemon's pages to the others and give it no new ones; afterwards it may be stopped."""
    request = SetDraining(node, is_draining=not undo, is_whole=whole)
    timeout_s = parse_seconds(timeout) if wait and not undo else 0.0

    async def ask(client: PoolClient) -> DrainProgress:
        return await _until_done(client, request, timeout_s)

    progress = ask_meta(running_settings(config, sets, state_file), ask)
    if as_json:
        print_json(msgspec.structs.asdict(progress))
    elif undo:
        print(f"{node} takes pages again")
    else:
        print(_text(node, progress))
    if wait and not undo and not progress.is_done:
        raise typer.Exit(EXIT_NOT_DONE)


async def _until_done(client: PoolClient, request: SetDraining, timeout_s: float) -> DrainProgress:
    """Asked again and again, it also goes on after a restart of the meta server. Raises StrataError."""
    progress = await client.call(request, DrainProgress)
    deadline = time.monotonic() + timeout_s
    is_shown = sys.stderr.isatty()
    while not progress.is_done and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
        try:
            progress = await client.call(request, DrainProgress)
        except Unavailable:
            continue
        if is_shown:
            print(f"\r\033[K{_text(request.node, progress)}", end="", file=sys.stderr, flush=True)
    if is_shown and timeout_s:
        print("\r\033[K", end="", file=sys.stderr)
    return progress


def _text(node: str, progress: DrainProgress) -> str:
    left = f"{progress.pages_left} pages ({show_bytes(progress.bytes_left)})"
    if not progress.is_done:
        return f"{node}: {progress.pages_moved} pages moved, {left} to go"
    rest = f"; nobody else has room for {left}" if progress.pages_left else ""
    return f"{node}: {progress.pages_moved} pages moved{rest}. It may be stopped."
