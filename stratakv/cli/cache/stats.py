"""`stratakv cache stats`: segments, namespaces with their rules, and counters, as the meta server has them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
from rich.table import Table

from stratakv.cli.cache.common import ask_meta, show_bytes, show_seconds
from stratakv.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    StateFileOption,
    print_json,
    running_settings,
    table_console,
)
from stratakv.wire import (
    CacheRule,
    GetStats,
    ListNamespaces,
    ListNodes,
    ListOwners,
    Namespaces,
    NamespaceState,
    Nodes,
    OwnerStates,
    Stats,
)

if TYPE_CHECKING:
    from stratakv.pool.shards import PoolClient


def stats(
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the pool holds: memory and disk of each daemon, namespaces and their rules, counters since the meta server's start."""
    nodes, namespaces, owners, counters = ask_meta(running_settings(config, sets, state_file), _ask)
    tenants = _tenant_rows(owners)
    if as_json:
        rows = [_node_row(nodes, namespaces, index) for index in range(len(nodes.nodes))]
        shown = [namespace_json(state) for state in namespaces.namespaces]
        totals = msgspec.structs.asdict(counters)
        print_json({"nodes": rows, "namespaces": shown, "tenants": tenants, "counters": totals})
    else:
        _print(nodes, namespaces, tenants, counters)


async def _ask(client: PoolClient) -> tuple[Nodes, Namespaces, OwnerStates, Stats]:
    return (
        await client.call(ListNodes(), Nodes),
        await client.call(ListNamespaces(), Namespaces),
        await client.call(ListOwners(), OwnerStates),
        await client.call(GetStats(), Stats),
    )


def _node_row(nodes: Nodes, namespaces: Namespaces, index: int) -> dict[str, Any]:
    state = nodes.nodes[index]
    segment = state.segment
    pages: Counter[str] = Counter()
    for namespace in namespaces.namespaces:
        pages.update(namespace.blocks_by_node)
    return {
        "node": segment.node,
        "tier": "disk" if segment.is_disk else "memory",
        "where": f"{segment.host}:{segment.port}",
        "pages": pages[segment.node],
        "used_bytes": state.used_bytes,
        "free_bytes": state.free_bytes,
        "size_bytes": segment.size_bytes,
        "read_only": state.read_only,
        "draining": state.is_draining,
        "limit_bytes": state.limit_bytes,
    }


def namespace_json(state: NamespaceState) -> dict[str, Any]:
    """A namespace for programs: its name in hex."""
    found: dict[str, Any] = msgspec.to_builtins(state, builtin_types=(bytes,))
    found["namespace"] = state.namespace.hex()
    rule = {name: getattr(state.rule, name) for name in ("ttl_s", "memory_bytes_max", "disk_bytes_max", "is_kept")}
    return found | {"rule": rule}


def rule_text(rule: CacheRule) -> str:
    """A rule in a few words; empty if it says nothing."""
    parts = [
        f"ttl {show_seconds(rule.ttl_s)}" if rule.ttl_s else "",
        f"memory {show_bytes(rule.memory_bytes_max)}" if rule.memory_bytes_max else "",
        f"disk {show_bytes(rule.disk_bytes_max)}" if rule.disk_bytes_max else "",
        "kept" if rule.is_kept else "",
    ]
    return ", ".join(part for part in parts if part)


def _tenant_rows(owners: OwnerStates) -> list[dict[str, Any]]:
    """Those of all shards together; a limit is that of each."""
    rows: dict[int, dict[str, Any]] = {}
    for state in owners.owners:
        limit = state.limit
        row = rows.setdefault(limit.owner, {"id": limit.owner, "memory_bytes": 0, "disk_bytes": 0})
        row["memory_bytes"] += state.memory_bytes
        row["disk_bytes"] += state.disk_bytes
        row |= {"name": limit.name, "memory_bytes_max": limit.memory_bytes_max, "disk_bytes_max": limit.disk_bytes_max}
    return list(rows.values())


def _print(nodes: Nodes, namespaces: Namespaces, tenants: list[dict[str, Any]], counters: Stats) -> None:
    console = table_console()
    table = Table("node", "tier", "pages", "used", "free", "size", "state", title="Segments")
    for index in range(len(nodes.nodes)):
        row = _node_row(nodes, namespaces, index)
        sizes = [show_bytes(row[name]) for name in ("used_bytes", "free_bytes", "size_bytes")]
        table.add_row(row["node"], row["tier"], str(row["pages"]), *sizes, state_text(row))
    console.print(table, markup=False)
    table = Table("namespace", "model", "blocks", "bytes", "rule", title="Namespaces")
    for state in namespaces.namespaces:
        where = ", ".join(f"{node} {show_bytes(size)}" for node, size in sorted(state.bytes_by_node.items()))
        table.add_row(
            state.namespace.hex(), ", ".join(state.models) or "-", str(state.blocks), where, rule_text(state.rule)
        )
    console.print(table, markup=False)
    if tenants:
        table = Table("tenant", "in memory", "of", "on disk", "of", title="Tenants")
        for row in tenants:
            columns = ("memory_bytes", "memory_bytes_max", "disk_bytes", "disk_bytes_max")
            shown = ("no limit" if row[name] is None else show_bytes(row[name]) for name in columns)
            table.add_row(row["name"], *shown)
        console.print(table, markup=False)
    console.print(
        f"lookups {counters.lookups}, hits {counters.lookup_hits}, removed for room {counters.evictions}"
        f" (the last of them not asked for since {counters.evicted_age_s:.0f} s),"
        f" to disk {counters.demoted}, back from disk {counters.promoted}, pins {counters.pins},"
        f" leases {counters.leases}, writes in progress {counters.puts_pending}",
        markup=False,
    )
    if counters.replicas_made or counters.replicas:
        console.print(
            f"copies of hot pages {counters.replicas} ({show_bytes(counters.replica_bytes)}), made {counters.replicas_made},"
            f" removed {counters.replicas_removed}, in place of a lost page {counters.replicas_promoted},"
            f" read {counters.replica_reads}",
            markup=False,
        )


def state_text(row: dict[str, Any]) -> str:
    """What is special about a segment now."""
    notes = [text for text, name in (("read-only", "read_only"), ("draining", "draining")) if row[name]]
    if row["limit_bytes"]:
        notes.append(f"limited to {show_bytes(row['limit_bytes'])}")
    return ", ".join(notes)
