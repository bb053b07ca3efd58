"""The ports of all services: those of the settings, checked to be free at once, or free ones taken now."""

from __future__ import annotations

import enum
import socket
from dataclasses import dataclass

from stratakv.errors import SetupError
from stratakv.settings import Settings


class PortChoice(enum.StrEnum):
    """Where ports come from."""

    DEFAULT = "default"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Ports:
    """One port per listener."""

    sql: int
    listener: int
    rest: int
    meta: int
    daemons: tuple[int, ...]
    workers: tuple[int, ...]


def choose_ports(settings: Settings, choice: PortChoice) -> Ports:
    """Ports for everything that `settings.up` counts. Raises SetupError that names every port in use and its setting."""
    num_workers = settings.up.prefill_workers + settings.up.decode_workers
    if choice is PortChoice.AUTO:
        sql, listener, rest, meta, *free = _free_ports(4 + settings.up.daemons + num_workers)
        return Ports(sql, listener, rest, meta, tuple(free[: settings.up.daemons]), tuple(free[settings.up.daemons :]))
    ports = Ports(
        settings.sql.port,
        settings.sql.listener_port,
        settings.rest.port,
        settings.meta.native_port,
        tuple(settings.dmp.port + i for i in range(settings.up.daemons)),
        tuple(settings.worker.port + i for i in range(num_workers)),
    )
    wanted = [("sql.port", ports.sql), ("rest.port", ports.rest), ("meta.native_port", ports.meta)]
    if settings.sql.listener_dir is None and (settings.sql.backend_url or settings.database.url):
        wanted.append(("sql.listener_port", ports.listener))
    wanted += [("dmp.port", port) for port in ports.daemons] + [("worker.port", port) for port in ports.workers]
    _require_free(wanted)
    return ports


def _require_free(wanted: list[tuple[str, int]]) -> None:
    mistakes, seen = [], dict[int, str]()
    for setting, port in wanted:
        name = f"STRATAKV_{setting.replace('.', '_').upper()}"
        if port in seen:
            mistakes.append(f"port {port} is wanted twice, by {seen[port]} and {setting} (set {name})")
        elif not _is_free(port):
            mistakes.append(f"port {port} is in use by another process (set {name} to move {setting})")
        seen[port] = setting
    if mistakes:
        raise SetupError(
            "\n".join(["Not every port is free:", *(f"  {m}" for m in mistakes)]),
            hint="Or take any free ports with `stratakv up --ports auto`.",
        )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the services do it: a port whose last connections are still closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
        return True


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
