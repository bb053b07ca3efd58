"""`stratakv meta groups`: quotas and policies of instances."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import typer

from stratakv.cli.cache.common import parse_seconds, parse_size, show_bytes
from stratakv.cli.meta.client import ServerOption, admin_client
from stratakv.cli.meta.shown import done, share_of, show
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, StateFileOption, print_json

app = typer.Typer(help="Quotas and policies of instances.")
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]
StorageOption = Annotated[
    list[str] | None,
    typer.Option("--storage", metavar="NAME", help="A candidate; repeatable, the preferred one first."),
]
CapacityOption = Annotated[str | None, typer.Option(metavar="SIZE", help="Most bytes it may have; 0: no limit.")]
KeysOption = Annotated[int | None, typer.Option("--max-keys", min=0, help="Most blocks it may have; 0: no limit.")]
InstancesOption = Annotated[int | None, typer.Option("--max-instances", min=0, help="0: no limit.")]
LevelOption = Annotated[
    float | None, typer.Option("--level", min=0, max=1, help="Share of a limit at which blocks are reclaimed.")
]
TtlOption = Annotated[str | None, typer.Option(metavar="TIME", help="Of policy ttl: blocks not read for so long go.")]


class Policy(enum.StrEnum):
    """Which blocks go first."""

    LRU = "lru"
    LFU = "lfu"
    TTL = "ttl"
    COST = "cost"


PolicyOption = Annotated[Policy | None, typer.Option(help="Which blocks go first.")]


@app.callback(invoke_without_command=True)
def groups(
    context: typer.Context,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """All groups, and what each uses of its quota."""
    if context.invoked_subcommand is not None:
        return
    found = admin_client(server, config, sets, state_file).call("listInstanceGroups")["groups"]
    columns = ("group", "instances", "bytes", "of its quota", "blocks", "of its limit", "policy", "storages")
    show(as_json, found, columns, [_row(one) for one in found])


def _row(state: dict[str, Any]) -> tuple[str, ...]:
    group = state["instance_group"]
    cache = group.get("cache_config", {})
    used, keys = int(state["used_bytes"]), int(state["key_count"])
    policy = cache.get("reclaim_strategy", {}).get("reclaim_policy", "POLICY_UNSPECIFIED")
    return (
        group["name"],
        state["instance_count"],
        show_bytes(used),
        share_of(used, int(group.get("quota", {}).get("capacity", 0))),
        str(keys),
        share_of(keys, int(cache.get("meta_indexer_config", {}).get("max_key_count", 0))),
        "lru" if policy == "POLICY_UNSPECIFIED" else policy.removeprefix("POLICY_").lower(),
        ", ".join(group["storage_candidates"]),
    )


@app.command("show")
def show_group(
    name: NameArgument,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Everything that was set; always JSON."""
    del as_json
    print_json(admin_client(server, config, sets, state_file).call("getInstanceGroup", name=name)["instance_group"])


@app.command("create")
def create(
    name: NameArgument,
    storage: StorageOption = None,
    capacity: CapacityOption = None,
    max_keys: KeysOption = None,
    max_instances: InstancesOption = None,
    level: LevelOption = None,
    policy: PolicyOption = None,
    ttl: TtlOption = None,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a group."""
    group: dict[str, Any] = {"name": name}
    _change(group, storage, capacity, max_keys, max_instances, level, policy, ttl)
    admin_client(server, config, sets, state_file).call("createInstanceGroup", instance_group=group)
    done(as_json, f"group {name} is created", instance_group=group)


@app.command("set")
def change(
    name: NameArgument,
    storage: StorageOption = None,
    capacity: CapacityOption = None,
    max_keys: KeysOption = None,
    max_instances: InstancesOption = None,
    level: LevelOption = None,
    policy: PolicyOption = None,
    ttl: TtlOption = None,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change what is named of a group, while it is in use."""
    client = admin_client(server, config, sets, state_file)
    group = client.call("getInstanceGroup", name=name)["instance_group"]
    _change(group, storage, capacity, max_keys, max_instances, level, policy, ttl)
    client.call("updateInstanceGroup", instance_group=group, current_version=group["version"])
    done(as_json, f"group {name} is changed", instance_group=group)


@app.command("remove")
def remove(
    name: NameArgument,
    server: ServerOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """It must have no instances."""
    admin_client(server, config, sets, state_file).call("removeInstanceGroup", name=name)
    done(as_json, f"group {name} is removed", removed=name)


def _change(
    group: dict[str, Any],
    storages: list[str] | None,
    capacity: str | None,
    max_keys: int | None,
    max_instances: int | None,
    level: float | None,
    policy: Policy | None,
    ttl: str | None,
) -> None:
    """Enter what was given."""
    cache = group.setdefault("cache_config", {})
    reclaim = cache.setdefault("reclaim_strategy", {})
    if storages is not None:
        group["storage_candidates"] = storages
    if capacity is not None:
        group.setdefault("quota", {})["capacity"] = parse_size(capacity)
    if max_keys is not None:
        cache.setdefault("meta_indexer_config", {})["max_key_count"] = max_keys
    if max_instances is not None:
        group["max_instance_count"] = max_instances
    if level is not None:
        reclaim.setdefault("trigger_strategy", {})["used_percentage"] = level
    if policy is not None:
        reclaim["reclaim_policy"] = f"POLICY_{policy.upper()}"
    if ttl is not None:
        reclaim["trigger_period_seconds"] = int(parse_seconds(ttl))
