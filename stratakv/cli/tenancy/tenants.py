"""`stratakv tenant`: who is served, which PostgreSQL roles log in for whom, and what was changed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from stratakv.cli.meta.shown import done, show
from stratakv.cli.options import (
    ConfigOption,
    DatabaseOption,
    JsonOption,
    SetOption,
    StateFileOption,
    database_url,
    print_json,
    running_settings,
)
from stratakv.cli.tenancy.common import (
    ModelsOption,
    NameArgument,
    NetworksOption,
    PermissionsOption,
    administration,
    checked_networks,
    demand_changes,
    list_or_any,
    shown_list,
    shown_time,
)

app = typer.Typer(help="Tenants: who is served, and which PostgreSQL roles log in for whom.", no_args_is_help=True)
WeightOption = Annotated[int | None, typer.Option(min=1, max=10_000, help="Share of the workers; 100 if not given.")]
SharesOption = Annotated[
    bool | None,
    typer.Option("--share-cache/--own-cache", help="Share KV with all other tenants that share; by default its own."),
]
RoleArgument = Annotated[str, typer.Argument(metavar="ROLE", help="A PostgreSQL role that logs in.")]
SqlDatabaseOption = Annotated[
    str | None,
    typer.Option("--sql-database", metavar="URL", help="The cluster of the role; by default sql.backend_url."),
]


def _changes(
    weight: int | None,
    permissions: list[Any] | None,
    models: list[str] | None,
    networks: list[str] | None,
    shares_cache: bool | None,
    enabled: bool | None = None,
) -> dict[str, Any]:
    """What was given."""
    plain = {"weight": weight, "shares_cache": shares_cache, "is_enabled": enabled}
    changes: dict[str, Any] = {name: value for name, value in plain.items() if value is not None}
    if permissions is not None:
        changes["permissions"] = [permission.value for permission in permissions]
    if models is not None:
        changes["models"] = list_or_any(models)
    if networks is not None:
        changes["networks"] = checked_networks(networks)
    return changes


@app.command("list")
def list_tenants(
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    deleted: Annotated[bool, typer.Option("--deleted", help="Also those that only their usage keeps.")] = False,
    as_json: JsonOption = False,
) -> None:
    """All tenants."""
    with administration(database, config, sets, state_file) as admin:
        found = admin.tenants(deleted=deleted)
    columns = ("tenant", "weight", "may", "models", "networks", "cache", "keys", "roles", "state")
    show(as_json, found, columns, [_row(one) for one in found])


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    state = "deleted" if one["deleted_at"] else "enabled" if one["is_enabled"] else "disabled"
    return (
        one["name"],
        str(one["weight"]),
        shown_list(one["permissions"]),
        shown_list(one["models"]),
        shown_list(one["networks"]),
        "shared" if one["shares_cache"] else "own",
        str(one["num_keys"]),
        str(one["num_roles"]),
        state,
    )


@app.command("show")
def show_tenant(
    name: NameArgument,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """A tenant with its keys, roles and limits; always JSON."""
    del as_json
    with administration(database, config, sets, state_file) as admin:
        found = admin.tenant(name)
        print_json({**found, "keys": admin.keys(name), "roles": admin.roles(name), "quota": admin.quotas(name)[0]})


@app.command("create")
def create(
    name: NameArgument,
    weight: WeightOption = None,
    permission: PermissionsOption = None,
    model: ModelsOption = None,
    network: NetworksOption = None,
    shares_cache: SharesOption = None,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a tenant; it may infer, with a cache of its own, unless something else is said."""
    with administration(database, config, sets, state_file) as admin:
        made = admin.create_tenant(name, _changes(weight, permission, model, network, shares_cache))
    done(as_json, f"tenant {name} is created", **made)


@app.command("update")
def update(
    name: NameArgument,
    weight: WeightOption = None,
    permission: PermissionsOption = None,
    model: ModelsOption = None,
    network: NetworksOption = None,
    shares_cache: SharesOption = None,
    enabled: Annotated[bool | None, typer.Option("--enable/--disable", help="A disabled one is refused.")] = None,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change what is named of a tenant, while it is in use."""
    changes = _changes(weight, permission, model, network, shares_cache, enabled)
    demand_changes(changes)
    with administration(database, config, sets, state_file) as admin:
        changed = admin.update_tenant(name, changes)
    done(as_json, f"tenant {name} is changed", **changed)


@app.command("delete")
def delete(
    name: NameArgument,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a tenant with its keys, roles and limits. While its usage is kept its name stays taken."""
    with administration(database, config, sets, state_file) as admin:
        is_gone = admin.delete_tenant(name)
    done(as_json, f"tenant {name} is deleted" + ("" if is_gone else "; its usage stays"), deleted=name, gone=is_gone)


@app.command("roles")
def roles(
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """PostgreSQL roles that log in for a tenant; all others log in for the tenant default."""
    with administration(database, config, sets, state_file) as admin:
        found = admin.roles(name)
    rows = [(one["tenant"], one["role"], str(one["oid"]), one["cluster"]) for one in found]
    show(as_json, found, ("tenant", "role", "OID", "cluster"), rows)


@app.command("map-role")
def map_role(
    name: NameArgument,
    role: RoleArgument,
    sql_database: SqlDatabaseOption = None,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sessions of the role are this tenant's from now on; void as soon as the role is dropped."""
    settings = running_settings(config, sets, state_file)
    with administration(database, config, sets, state_file) as admin:
        url = database_url(sql_database or settings.sql.backend_url or database, settings)
        mapped = admin.map_role(name, role, url)
    done(as_json, f"role {role} logs in for tenant {name}", **mapped)


@app.command("unmap-role")
def unmap_role(
    role: RoleArgument,
    cluster: Annotated[str | None, typer.Option(metavar="ID", help="Where several clusters have it.")] = None,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sessions of the role are the tenant default's again."""
    with administration(database, config, sets, state_file) as admin:
        admin.unmap_role(role, cluster)
    done(as_json, f"role {role} logs in for tenant default", unmapped=role)


@app.command("audit")
def audit(
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="So many of the last changes.")] = 50,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What was changed of tenants, keys, roles and limits, and by whom; the newest first."""
    with administration(database, config, sets, state_file) as admin:
        found = admin.audit(name, limit)
    rows = [
        (shown_time(one["at"]), one["actor"], one["tenant"] or "", one["object"], one["action"], _difference(one))
        for one in found
    ]
    show(as_json, found, ("when", "who", "tenant", "what", "", "change"), rows)


def _difference(entry: dict[str, Any]) -> str:
    before, after = entry["before"] or {}, entry["after"] or {}
    if not before or not after:
        return ""
    changed = {name: value for name, value in after.items() if before.get(name) != value}
    return ", ".join(f"{name}: {json.dumps(before.get(name))} → {json.dumps(value)}" for name, value in changed.items())
