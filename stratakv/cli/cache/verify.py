"""`stratakv cache verify`: every page of the pool, read as a reader would and checked."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from stratakv.cli.cache.common import ask_meta, parse_size, show_bytes
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, StateFileOption, print_json, running_settings
from stratakv.errors import InvalidRequest, StrataError
from stratakv.wire import ListNamespaces, ListNodes, Namespaces, Nodes, NodeState

if TYPE_CHECKING:
    from stratakv.pool.auth import PoolCredentials
    from stratakv.pool.shards import PoolClient
    from stratakv.pool.verify import Findings

EXIT_DAMAGED = 1
CONNECT_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Report:
    findings: list[Findings] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Node → why it was not checked to the end."""

    @property
    def is_good(self) -> bool:
        return not self.failures and not any(found.damaged for found in self.findings)


def verify(
    node: Annotated[
        str | None, typer.Option(metavar="NODE", help="Only this segment, such as dmp-0 or dmp-0/disk.")
    ] = None,
    rate: Annotated[str, typer.Option(metavar="SIZE", help="Read at most so much in a second.")] = "256MiB",
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every page and check it; damaged ones are dropped. Exits 1 if there was any, or if not all could be read."""
    from stratakv.pool.auth import PoolCredentials

    settings = running_settings(config, sets, state_file)
    if not (bytes_per_s := parse_size(rate)):
        raise InvalidRequest("--rate 0 reads nothing", hint="Give a size a second, such as 256MiB.")
    credentials = PoolCredentials.from_settings(settings.pool)

    async def ask(client: PoolClient) -> _Report:
        nodes = (await client.call(ListNodes(), Nodes)).nodes
        chosen = [state for state in nodes if node in (None, state.segment.node)]
        silent = [name for name in await _silent(client, nodes) if node in (None, name)]
        if node is not None and not chosen and not silent:
            raise InvalidRequest(f"no node {node!r} is in the pool", hint="`stratakv cache stats` lists them.")
        report = await _verify(client, chosen, bytes_per_s, credentials)
        report.failures.update(dict.fromkeys(silent, "its daemon is silent, so nobody finds its pages"))
        return report

    report = ask_meta(settings, ask)
    if as_json:
        print_json(_as_json(report))
    else:
        _print(report)
    if not report.is_good:
        raise typer.Exit(EXIT_DAMAGED)


async def _silent(client: PoolClient, alive: list[NodeState]) -> list[str]:
    """Segments that have pages and are not heard of."""
    namespaces = (await client.call(ListNamespaces(), Namespaces)).namespaces
    with_pages = {name for state in namespaces for name, blocks in state.blocks_by_node.items() if blocks}
    return sorted(with_pages - {state.segment.node for state in alive})


async def _verify(
    client: PoolClient, nodes: list[NodeState], bytes_per_s: int, credentials: PoolCredentials | None
) -> _Report:
    from stratakv.pool.dmp_client import connect
    from stratakv.pool.verify import Verifier

    report = _Report()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for state in nodes:
            segment = state.segment
            task = progress.add_task(segment.node, total=state.used_bytes)
            try:
                deadline = time.monotonic() + CONNECT_TIMEOUT_S
                connection = await asyncio.to_thread(connect, segment, deadline=deadline, credentials=credentials)
            except StrataError as error:
                report.failures[segment.node] = error.message
                continue
            verifier = Verifier(client, segment, connection, bytes_per_s)
            report.findings.append(verifier.findings)
            try:
                await verifier.run(lambda found, task=task: progress.update(task, completed=found.size_bytes))  # type: ignore[misc]
            except StrataError as error:
                report.failures[segment.node] = error.message
            finally:
                connection.close()
    return report


def _as_json(report: _Report) -> dict[str, Any]:
    nodes = [
        {
            "node": found.node,
            "pages": found.pages,
            "bytes": found.size_bytes,
            "header_only": found.header_only,
            "gone": found.gone,
            "damaged": [
                {"namespace": p.namespace.hex(), "key": p.key.hex(), "offset": p.extent.offset} for p in found.damaged
            ],
        }
        for found in report.findings
    ]
    return {"nodes": nodes, "failures": report.failures}


def _print(report: _Report) -> None:
    for found in report.findings:
        notes = [f"{found.pages} pages, {show_bytes(found.size_bytes)} checked, {len(found.damaged)} damaged"]
        if found.header_only:
            notes.append(f"of {found.header_only} only the header")
        if found.gone:
            notes.append(f"{found.gone} gone meanwhile")
        print(f"{found.node}: {'; '.join(notes)}")
        for page in found.damaged:
            print(f"  dropped {page.key.hex()} of {page.namespace.hex()}, at {page.extent.offset}")
    for node, reason in report.failures.items():
        print(f"{node}: not checked to the end: {reason}")
