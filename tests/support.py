"""What many tests need: waiting with a deadline, free ports."""

from __future__ import annotations

import asyncio
import inspect
import socket
import time
from collections.abc import Awaitable, Callable

POLL_S = 0.02


def eventually(check: Callable[[], object], *, timeout_s: float = 20.0, what: str = "") -> None:
    """Poll until `check()` is true; fails with its last value at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (value := check()):
        assert time.monotonic() < deadline, f"{what or 'condition'} not met within {timeout_s} s: {value!r}"
        time.sleep(POLL_S)


async def eventually_async(
    check: Callable[[], object] | Callable[[], Awaitable[object]], *, timeout_s: float = 20.0, what: str = ""
) -> None:
    """`eventually` for code on the event loop; `check` may be a coroutine function."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = check()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return
        assert time.monotonic() < deadline, f"{what or 'condition'} not met within {timeout_s} s: {value!r}"
        await asyncio.sleep(POLL_S)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
