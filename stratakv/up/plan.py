"""Which processes `stratakv up` runs, with which environment, and how each shows that it is ready."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from stratakv.config import options, value_text
from stratakv.process import reachable_host
from stratakv.settings import Settings
from stratakv.up.ports import Ports
from stratakv.wire import WorkerRole

DISK_DIR = "kv"
"""Below `up.data_dir`: the disk tier, unless `dmp.disk_dir` names another place."""
JOURNAL_DIR = "workers"
"""Below the data directory, as the disk tier."""


class Kind(enum.StrEnum):
    """A service, by the module that runs it."""

    META = "meta_server"
    DAEMON = "dmp"
    WORKER = "workers"
    DB_NODE = "dbnode"


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One process."""

    name: str
    kind: Kind
    port: int
    url: str
    env: Mapping[str, str] = field(repr=False)
    """All its settings, secrets too."""


def place_ports(settings: Settings, ports: Ports) -> Settings:
    """The settings with the ports that were chosen."""
    return replace(
        settings,
        sql=replace(settings.sql, port=ports.sql, listener_port=ports.listener),
        rest=replace(settings.rest, port=ports.rest),
        meta=replace(settings.meta, native_port=ports.meta),
    )


def make_plan(settings: Settings, ports: Ports) -> list[ServiceSpec]:
    """All services in the order in which they start; they stop in the reverse order."""
    if settings.dmp.disk_dir is None:
        disk_dir = settings.up.data_dir.expanduser().absolute() / DISK_DIR
        settings = replace(settings, dmp=replace(settings.dmp, disk_dir=disk_dir))
    if settings.worker.journal_dir is None:
        journal_dir = settings.up.data_dir.expanduser().absolute() / JOURNAL_DIR
        settings = replace(settings, worker=replace(settings.worker, journal_dir=journal_dir))
    common = _environment(settings)
    plan = [_service("meta", Kind.META, ports.meta, "tcp", common)]
    daemons = [f"dmp-{i}" for i in range(len(ports.daemons))]
    for name, port in zip(daemons, ports.daemons, strict=True):
        plan.append(_service(name, Kind.DAEMON, port, "tcp", common, DMP_NODE=name, DMP_PORT=str(port)))
    roles = [WorkerRole.PREFILL] * settings.up.prefill_workers + [WorkerRole.DECODE] * settings.up.decode_workers
    counts = dict.fromkeys(WorkerRole, 0)
    for i, (role, port) in enumerate(zip(roles, ports.workers, strict=True)):
        name = f"{role}-{counts[role]}"
        counts[role] += 1
        node = daemons[i % len(daemons)] if daemons else ""
        given = {"WORKER_NAME": name, "WORKER_ROLE": role.value, "WORKER_PORT": str(port), "WORKER_NODE": node}
        plan.append(_service(name, Kind.WORKER, port, "http", common, **given))
    workers = ",".join(spec.url for spec in plan if spec.kind is Kind.WORKER)
    db_node = _service("dbnode", Kind.DB_NODE, ports.rest, "http", common, ROUTER_WORKERS=workers)
    return [*plan, replace(db_node, url=f"http://{reachable_host(settings.rest.host)}:{ports.rest}")]


def _service(name: str, kind: Kind, port: int, scheme: str, common: Mapping[str, str], **given: str) -> ServiceSpec:
    env = {**common, **{f"STRATAKV_{key}": value for key, value in given.items()}}
    return ServiceSpec(name, kind, port, f"{scheme}://127.0.0.1:{port}", env)


def _environment(settings: Settings) -> dict[str, str]:
    """Every setting that differs from its default, as the environment variables that say so."""
    env: dict[str, str] = {}
    for option in options():
        value = getattr(getattr(settings, option.section), option.key)
        if value != option.default:
            env[option.env] = value_text(value)
    return env
