"""What the commands of `stratakv cache` and `stratakv drain` share: asking the meta server, naming namespaces, times, sizes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from stratakv.config import parse_value
from stratakv.errors import InvalidRequest
from stratakv.settings import Bytes, Settings
from stratakv.wire import ListNamespaces, Namespaces, NamespaceState

if TYPE_CHECKING:
    from stratakv.pool.shards import PoolClient

T = TypeVar("T")
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The namespaces of this model's workers.")
]
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def ask_meta(settings: Settings, ask: Callable[[PoolClient], Awaitable[T]]) -> T:
    """Run `ask` with a client of the meta server, or of all shards. Raises StrataError."""
    from stratakv.pool.auth import PoolCredentials
    from stratakv.pool.shards import pool_client

    async def run() -> T:
        credentials = PoolCredentials.from_settings(settings.pool)
        async with pool_client(settings.meta, role="cli", credentials=credentials) as client:
            return await ask(client)

    return asyncio.run(run())


async def choose_namespaces(client: PoolClient, prefix: str | None, model: str | None) -> list[NamespaceState]:
    """Those that the operator means: one by the beginning of its hex name, or all of a model. Raises InvalidRequest."""
    if prefix is not None and model is not None:
        raise InvalidRequest("a namespace and --model are both given", hint="Name what is meant by one of them.")
    if prefix == "":
        raise InvalidRequest("the name of the namespace is empty", hint="`stratakv cache stats` lists the namespaces.")
    known = (await client.call(ListNamespaces(), Namespaces)).namespaces
    if prefix is not None:
        found = [state for state in known if state.namespace.hex().startswith(prefix.lower())]
        if len(found) > 1:
            raise InvalidRequest(f"{prefix} begins the names of {len(found)} namespaces", hint="Give more of the name.")
    else:
        found = [state for state in known if model in state.models]
    if not found:
        raise InvalidRequest(
            f"no namespace has the name {prefix}" if prefix is not None else f"no worker of model {model} is alive",
            hint="`stratakv cache stats` lists the namespaces.",
        )
    return found


def parse_seconds(text: str) -> float:
    """90, 90s, 15m, 1h or 7d → seconds. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None:
        raise typer.BadParameter(f"expected a time such as 90s, 15m, 1h or 7d, got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def parse_size(text: str) -> int:
    """512MiB → bytes. Raises typer.BadParameter."""
    try:
        return int(parse_value(Bytes, text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def show_bytes(size_bytes: int) -> str:
    """In the unit that leaves one to four digits."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def show_seconds(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:g}s"
