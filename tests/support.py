"""What many tests need: waiting with a deadline, free ports."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import secrets
import socket
import time
from collections.abc import Awaitable, Callable

POLL_S = 0.02
PORTS = range(16_384, 32_768)
_port_numbers = itertools.count(secrets.randbelow(len(PORTS)))


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
    """A TCP port of 127.0.0.1 that was free just now, and that nobody gets by chance before it is used.

    What connects, or listens anywhere, gets a port above this range from the kernel. Each run begins at a place of its own.
    """
    while True:
        port = PORTS[next(_port_numbers) % len(PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
