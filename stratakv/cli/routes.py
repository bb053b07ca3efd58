"""`stratakv status --routes`: the DB node's last routing decisions, and why."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from stratakv.cli.options import print_json, table_console
from stratakv.errors import Unavailable
from stratakv.process import reachable_host
from stratakv.settings import Settings

TIMEOUT_S = 3.0
ROUTES_SHOWN = 20
"""The last ones; --json has all that the DB node remembers."""


async def show_routes(settings: Settings, *, as_json: bool) -> None:
    """Print them. Raises Unavailable if the DB node does not answer."""
    routes = await _ask(settings)
    if as_json:
        print_json(routes)
    else:
        table_console().print(_table(routes[-ROUTES_SHOWN:]), markup=False)


async def _ask(settings: Settings) -> list[dict[str, Any]]:
    import aiohttp

    from stratakv.up.readiness import authorization

    url = f"http://{reachable_host(settings.rest.host)}:{settings.rest.port}/admin/routes"
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=authorization(settings.rest)) as session,
            session.get(url, raise_for_status=True) as response,
        ):
            routes: list[dict[str, Any]] = (await response.json())["routes"]
            return routes
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise Unavailable(f"the DB node at {url} does not answer: {error}", hint="Is it running?") from None


def _table(routes: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("at", "request", "worker", "tokens", "to compute", "why", "scores", title="Routes")
    for route in routes:
        at = datetime.datetime.fromtimestamp(route["at_unix_s"]).strftime("%H:%M:%S.%f")[:-3]
        scores = sorted(route["scores"].items(), key=lambda item: item[1])
        table.add_row(
            at,
            route["request_id"] + (f" (attempt {route['attempt'] + 1})" if route["attempt"] else ""),
            f"{route['prefill']} → {route['worker']}" if route["prefill"] else route["worker"],
            str(route["prompt_tokens"]),
            str(route["uncached_tokens"]),
            f"{route['policy']}: {route['reason']}",
            ", ".join(f"{worker} {score:.0f}" for worker, score in scores) + f" {route['unit']}",
        )
    return table
