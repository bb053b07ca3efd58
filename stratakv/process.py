"""What every service process does the same way: read flags, set up logs, run one event loop, end on a signal.

The first SIGTERM or SIGINT sets `stop`, a service then drains; a second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence

from stratakv.config import parse_flags
from stratakv.errors import SetupError
from stratakv.log import configure_logging
from stratakv.settings import Settings

_ALL_ADDRESSES = ("", "0.0.0.0", "::")
GC_OBJECTS = 10_000
"""Made and not freed since the last time garbage was looked for."""
EXIT_SETUP = 2
"""Exit status after a SetupError."""

Service = Callable[[Settings, asyncio.Event], Awaitable[None]]


def run_service(
    prog: str, description: str, sections: Sequence[str], service: Service, argv: Sequence[str] | None = None
) -> int:
    """Run `service(settings, stop)` until it returns; the process's exit status."""
    try:
        settings = parse_flags(prog, description, (*sections, "log"), sys.argv[1:] if argv is None else argv)
        configure_logging(settings.log)
        # Here, since pool clients inside other engines come by this module and run no service.
        import uvloop

        uvloop.run(_until_stopped(service, settings))
    except SetupError as error:
        print(f"{prog}: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"{prog}: {error.hint}", file=sys.stderr)
        return EXIT_SETUP
    return 0


async def _until_stopped(service: Service, settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await service(settings, stop)


def on_hangup(reload: Callable[[], None]) -> None:
    """Call `reload` at every SIGHUP, in a service that runs as a process of its own."""
    if threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def first_setup_error(group: BaseExceptionGroup[SetupError]) -> SetupError:
    """Of those that a TaskGroup gathered: an operator mends one thing at a time."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SetupError)
    return error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a listener on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reachable_host(host: str) -> str:
    """Where a process of this machine reaches a listener on `host`, which may stand for all addresses."""
    return "127.0.0.1" if host in _ALL_ADDRESSES else host


def advertised_host(host: str, public_host: str, section: str) -> str:
    """What others are told to connect to. Raises SetupError for a listener on all addresses that names none."""
    if not public_host and host in _ALL_ADDRESSES:
        raise SetupError(
            f"{section}.host = {host} is every address of this machine",
            hint=f"Say with {section}.public_host which of them others can reach.",
        )
    return public_host or host


def require_loopback(host: str, setting: str, why: str) -> None:
    """Raises SetupError unless `host` is a loopback address: `why` says what is missing to listen elsewhere."""
    if not is_loopback(host):
        raise SetupError(f"{setting} = {host}: will not listen beyond this machine, {why}")


def port_taken(host: str, port: int, setting: str) -> SetupError:
    """The error for a port in use."""
    return SetupError(
        f"{setting}: port {port} on {host} is taken by another process",
        hint=f"end that process, or choose another port with STRATAKV_{setting.replace('.', '_').upper()}",
    )


def started() -> None:
    """Call when start-up is over: what lives by now stays, and need not be searched for garbage again.

    A full collection over the objects of torch and transformers takes 130 ms, in the middle of some request. What comes later is
    looked through less often than Python would: a request makes a thousand objects, hardly any of which need it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS)
