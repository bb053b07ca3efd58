"""`stratakv key`: API keys of tenants. A key is shown once, when it is made; afterwards only its beginning."""

from __future__ import annotations

from typing import Annotated

import typer

from stratakv.cli.cache.common import parse_seconds
from stratakv.cli.meta.shown import done, show
from stratakv.cli.options import ConfigOption, DatabaseOption, JsonOption, SetOption, StateFileOption
from stratakv.cli.tenancy.common import (
    ModelsOption,
    NetworksOption,
    PermissionsOption,
    administration,
    checked_networks,
    list_or_any,
    shown_list,
    shown_time,
)
from stratakv.tenancy.api_key import NewKey

app = typer.Typer(help="API keys of tenants.", no_args_is_help=True)
TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]
PrefixArgument = Annotated[str, typer.Argument(metavar="PREFIX", help="The beginning that `stratakv key list` shows.")]


@app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT")] = None,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keys of all tenants, or of one."""
    with administration(database, config, sets, state_file) as admin:
        found = admin.keys(tenant)
    rows = [
        (
            one["tenant"],
            one["name"],
            one["prefix"],
            one["state"],
            shown_time(one["expires_at"]) or "never",
            "as the tenant" if one["permissions"] is None else shown_list(one["permissions"]),
            "as the tenant" if one["models"] is None else shown_list(one["models"]),
            "as the tenant" if one["networks"] is None else shown_list(one["networks"]),
        )
        for one in found
    ]
    show(as_json, found, ("tenant", "name", "prefix", "state", "expires", "may", "models", "networks"), rows)


@app.command("create")
def create(
    tenant: TenantArgument,
    name: Annotated[str, typer.Option(help="What it is for.")] = "key",
    expires: Annotated[str | None, typer.Option(metavar="TIME", help="It ends after so long: 12h, 90d.")] = None,
    permission: PermissionsOption = None,
    model: ModelsOption = None,
    network: NetworksOption = None,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it. It may do what its tenant may, or what is named of that."""
    with administration(database, config, sets, state_file) as admin:
        made = admin.create_key(
            tenant,
            name,
            lifetime_s=None if expires is None else parse_seconds(expires),
            permissions=None if permission is None else [one.value for one in permission],
            models=list_or_any(model),
            networks=checked_networks(network),
        )
    _print(as_json, made, tenant)


@app.command("revoke")
def revoke(
    prefix: PrefixArgument,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """The key is let in no longer; DB nodes know within seconds."""
    with administration(database, config, sets, state_file) as admin:
        revoked = admin.revoke_key(prefix)
    done(as_json, f"key {prefix} is revoked", **revoked)


@app.command("rotate")
def rotate(
    prefix: PrefixArgument,
    grace: Annotated[str, typer.Option(metavar="TIME", help="The old key ends after so long; 0: at once.")] = "1h",
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make another key for the same and print it; the old one goes on for a while."""
    grace_s = parse_seconds(grace)
    with administration(database, config, sets, state_file) as admin:
        made = admin.rotate_key(prefix, grace_s)
    _print(as_json, made, None)


def _print(as_json: bool, made: NewKey, tenant: str | None) -> None:
    about = {"tenant": tenant} if tenant else {}
    text = f"{made.key}\nIt is not shown again; `stratakv key` knows it as {made.prefix}."
    done(as_json, text, key=made.key, prefix=made.prefix, **about)
