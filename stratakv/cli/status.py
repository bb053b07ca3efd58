"""`stratakv status`: what runs, as the DB node and the meta server tell."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table

from stratakv.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    StateFileOption,
    print_json,
    running_settings,
    table_console,
)
from stratakv.cli.routes import show_routes
from stratakv.errors import StrataError
from stratakv.process import reachable_host
from stratakv.settings import Settings
from stratakv.wire import GetStats, LeaderState, ListNodes, ListWorkers, Nodes, NodeState, Stats, Workers, WorkerState
from stratakv.worker_address import VLLM_SCHEME

TIMEOUT_S = 3.0
EXIT_NOT_READY = 1
MIB = 1024 * 1024


@dataclass(slots=True)
class Report:
    """What was found out."""

    db_node: dict[str, str] = field(default_factory=dict)
    meta_address: str = ""
    meta_server: str = "no answer"
    meta_servers: dict[str, str] = field(default_factory=dict)
    """Address → leads, stands by or no answer."""
    stats: Stats | None = None
    nodes: list[NodeState] = field(default_factory=list)
    workers: list[WorkerState] = field(default_factory=list)
    vllm_servers: list[dict[str, Any]] = field(default_factory=list)
    """As the DB node tells: they register with nobody."""


def status(
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
    routes: Annotated[
        bool, typer.Option("--routes", help="The last routing decisions instead, with scores and reasons.")
    ] = False,
) -> None:
    """Health of the DB node, the meta server, the pool and the workers. Exits 1 if the DB node is not ready."""
    settings = running_settings(config, sets, state_file)
    if routes:
        asyncio.run(show_routes(settings, as_json=as_json))
        return
    report = asyncio.run(_ask(settings))
    if as_json:
        print_json(_as_json(report))
    else:
        _print(report)
    if report.db_node["ready"] != "yes":
        raise typer.Exit(EXIT_NOT_READY)


async def _ask(settings: Settings) -> Report:
    report = Report()
    await asyncio.gather(_ask_db_node(settings, report), _ask_meta_server(settings, report))
    return report


async def _ask_db_node(settings: Settings, report: Report) -> None:
    import aiohttp

    from stratakv.up.readiness import authorization

    url = f"http://{reachable_host(settings.rest.host)}:{settings.rest.port}"
    report.db_node = {"url": url, "sql": f"{settings.sql.host}:{settings.sql.port}"}
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), headers=authorization(settings.rest)
    ) as session:
        for name, path in (("health", "/health"), ("ready", "/ready")):
            try:
                async with session.get(url + path) as response:
                    report.db_node[name] = "yes" if response.status == 200 else f"no ({response.status})"
            except (aiohttp.ClientError, TimeoutError):
                report.db_node[name] = "no answer"
        try:
            async with session.get(f"{url}/admin/workers") as response:
                found = (await response.json())["workers"] if response.status == 200 else []
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return  # said above
        report.vllm_servers = [worker for worker in found if worker["url"].startswith(VLLM_SCHEME)]


async def _ask_meta_server(settings: Settings, report: Report) -> None:
    from stratakv.pool.auth import PoolCredentials
    from stratakv.pool.meta_servers import leader_states
    from stratakv.pool.shards import pool_client

    report.meta_address = f"{settings.meta.host}:{settings.meta.native_port}"
    credentials = PoolCredentials.from_settings(settings.pool)
    meta = pool_client(settings.meta, credentials=credentials)
    try:
        states = await leader_states(settings.meta, credentials)
        report.meta_servers = {address: _role(state) for address, state in states.items()}
        report.stats = await meta.call(GetStats(), Stats)
        report.nodes = (await meta.call(ListNodes(), Nodes)).nodes
        report.workers = (await meta.call(ListWorkers(), Workers)).workers
        report.meta_server = "yes"
    except StrataError as error:
        report.meta_server = f"no answer ({error.message})"
    finally:
        await meta.close()


def _role(state: LeaderState | None) -> str:
    if state is None:
        return "no answer"
    return "leads" if state.is_leader else "stands by"


def _as_json(report: Report) -> dict[str, Any]:
    found = asdict(report)
    for name in ("stats", "nodes", "workers"):
        # bytes, such as epochs, become hex
        found[name] = msgspec.to_builtins(getattr(report, name), builtin_types=(bytes,))
    return {name: _hex(value) for name, value in found.items()}


def _hex(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _hex(item) for key, item in value.items()}
    return [_hex(item) for item in value] if isinstance(value, list) else value


def _print(report: Report) -> None:
    console = table_console()
    services = Table("service", "where", "alive", "ready", title="Services")
    services.add_row("DB node", report.db_node["url"], report.db_node["health"], report.db_node["ready"])
    if len(report.meta_servers) <= 1:
        services.add_row("meta server", report.meta_address, report.meta_server, report.meta_server)
    else:
        for address, role in report.meta_servers.items():
            services.add_row("meta server", address, "no answer" if role == "no answer" else "yes", role)
    console.print(services, markup=False)
    workers = Table("worker", "role", "model", "url", "running", "waiting", "cache in use", title="Workers")
    for state in report.workers:
        info, load = state.info, state.load
        used = load.l1_blocks_total - load.l1_blocks_free
        workers.add_row(
            info.worker,
            info.role.value,
            info.model,
            info.url,
            str(load.running),
            str(load.waiting),
            f"{used} of {load.l1_blocks_total} blocks",
        )
    console.print(workers, markup=False)
    if report.vllm_servers:
        console.print(_vllm_table(report.vllm_servers), markup=False)
    nodes = Table("daemon", "where", "used", "size", title="Memory pool")
    for node in report.nodes:
        segment = node.segment
        nodes.add_row(
            segment.node,
            f"{segment.host}:{segment.port}",
            f"{node.used_bytes // MIB} MiB",
            f"{segment.size_bytes // MIB} MiB",
        )
    console.print(nodes, markup=False)
    if report.stats is not None:
        stats = report.stats
        console.print(
            f"{_count(stats.blocks, 'block')} in the pool, {_count(stats.lookups, 'lookup')},"
            f" {_count(stats.lookup_hits, 'hit')}, {_count(stats.evictions, 'eviction')}",
            markup=False,
        )


def _vllm_table(servers: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        "server", "alive", "role", "model", "running", "waiting", "cache in use", "events", title="vLLM servers"
    )
    for server in servers:
        info, load, events = server["info"] or {}, server["load"], server["events"]
        total = load.get("l1_blocks_total", 0)
        table.add_row(
            server["url"],
            "yes" if server["alive"] else f"no: {server['problem']}",
            info.get("role", ""),
            info.get("model", ""),
            str(load.get("running", 0)),
            str(load.get("waiting", 0)),
            f"{total - load.get('l1_blocks_free', 0)} of {total} blocks",
            " ".join(filter(None, (events["state"], events["detail"]))) if events else "none",
        )
    return table


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
