"""`stratakv quota`: what tenants may take, and what they have taken."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stratakv.cli.cache.common import parse_size, show_bytes
from stratakv.cli.meta.shown import done, show
from stratakv.cli.options import ConfigOption, DatabaseOption, JsonOption, SetOption, StateFileOption, print_json
from stratakv.cli.tenancy.common import administration, demand_changes
from stratakv.tenancy.values import TOKEN_MICROS

app = typer.Typer(help="Limits of tenants, and what is taken of them.", no_args_is_help=True)
TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]
NO_LIMIT = "none"
_COUNTED = {
    "requests_per_minute": "requests_minute_used",
    "tokens_per_minute": "tokens_minute_used",
    "parallel_requests": "parallel_used",
    "tokens_per_month": "tokens_month_used",
}


@app.command("list")
def list_quotas(
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """All tenants: taken of each limit, reservations that are open and that nobody could settle."""
    with administration(database, config, sets, state_file) as admin:
        found = admin.quotas()
    requests = ("requests/min", "tokens/min", "parallel", "tokens/month")
    columns = ("tenant", *requests, "KV in memory", "KV on disk", "open", "unsettled")
    show(as_json, found, columns, [_row(one) for one in found])


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    taken = (_share(one[used], one[limit]) for limit, used in _COUNTED.items())
    cached = (_share_of_bytes(one[f"cache_{tier}_used"], one[f"cache_{tier}_bytes"]) for tier in ("memory", "disk"))
    return (one["tenant"], *taken, *cached, str(one["open_reservations"]), str(one["unsettled_reservations"]))


def _share_of_bytes(used: int, limit: int | None) -> str:
    return show_bytes(used) if limit is None else f"{show_bytes(used)} of {show_bytes(limit)}"


def _share(used: int | None, limit: int | None) -> str:
    return "no limit" if limit is None else f"{used or 0} of {limit}"


@app.command("show")
def show_quota(
    tenant: TenantArgument,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Limits of one tenant and what is taken of them; always JSON."""
    del as_json
    with administration(database, config, sets, state_file) as admin:
        admin.tenant(tenant)
        print_json(admin.quotas(tenant)[0])


@app.command("set")
def set_quota(
    tenant: TenantArgument,
    requests_per_minute: Annotated[str | None, typer.Option(metavar="N", help="`none`: no limit.")] = None,
    tokens_per_minute: Annotated[str | None, typer.Option(metavar="N", help="Prompt and answer; `none`.")] = None,
    parallel: Annotated[str | None, typer.Option(metavar="N", help="Requests at the same time; `none`.")] = None,
    tokens_per_month: Annotated[str | None, typer.Option(metavar="N", help="Months in UTC; `none`.")] = None,
    cached_ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="What a prompt token counts whose KV was cached.")
    ] = None,
    cache_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="KV in the pool's memory; `none`.")] = None,
    cache_disk: Annotated[str | None, typer.Option(metavar="SIZE", help="KV on the pool's disks; `none`.")] = None,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set what is named; the rest stays as it is."""
    numbers = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "parallel_requests": parallel,
        "tokens_per_month": tokens_per_month,
    }
    changes = {name: _number(text) for name, text in numbers.items() if text is not None}
    sizes = {"cache_memory_bytes": cache_memory, "cache_disk_bytes": cache_disk}
    changes |= {n: None if text == NO_LIMIT else parse_size(text) for n, text in sizes.items() if text is not None}
    if cached_ratio is not None:
        changes["cached_token_micros"] = round(cached_ratio * TOKEN_MICROS)
    demand_changes(changes)
    with administration(database, config, sets, state_file) as admin:
        found = admin.set_limits(tenant, changes)
    done(as_json, f"the limits of tenant {tenant} are set", **found)


@app.command("clear")
def clear(
    tenant: TenantArgument,
    database: DatabaseOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """No limits any more."""
    with administration(database, config, sets, state_file) as admin:
        admin.clear_limits(tenant)
    done(as_json, f"tenant {tenant} has no limits", cleared=tenant)


def _number(text: str) -> int | None:
    """Raises typer.BadParameter."""
    if text == NO_LIMIT:
        return None
    if not (text.isascii() and text.isdigit()):
        raise typer.BadParameter(f"expected a number or `{NO_LIMIT}`, got {text!r}")
    return int(text)
