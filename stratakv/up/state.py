"""The state file of `stratakv up`: URLs and process ids as JSON, for scripts and tests; there while it runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from stratakv.postgres import METADATA_DATABASE, SUPERUSER
from stratakv.process import reachable_host
from stratakv.settings import Settings
from stratakv.up.supervisor import Supervisor


def sql_url(settings: Settings) -> str:
    """Where PostgreSQL clients connect: the DB node, with the role and database of its backend; without a password."""
    backend = urlsplit(settings.sql.backend_url or settings.database.url or "")
    user, database = backend.username or SUPERUSER, backend.path.lstrip("/") or METADATA_DATABASE
    return f"postgresql://{user}@{reachable_host(settings.sql.host)}:{settings.sql.port}/{database}"


@dataclass(frozen=True, slots=True)
class StateFile:
    """Writes what is known to `path`, which only its owner may read: the database URL can hold a password."""

    path: Path
    settings: Settings

    def write(self, supervisor: Supervisor) -> None:
        """Replace the file at once, so that no reader sees half of it."""
        settings = self.settings
        cluster = supervisor.cluster
        state = {
            "ready": supervisor.is_ready,
            "pid": os.getpid(),
            "sql_url": sql_url(settings),
            "sql_port": settings.sql.port,
            "rest_url": f"http://{reachable_host(settings.rest.host)}:{settings.rest.port}",
            "meta_host": settings.meta.host,
            "meta_port": settings.meta.native_port,
            "database_url": str(settings.database.url),
            "database_pid": cluster.pid if cluster is not None and cluster.is_running() else None,
            "model": settings.model.name,
            "services": {
                child.spec.name: {
                    "kind": child.spec.kind.value,
                    "pid": child.pid,
                    "port": child.spec.port,
                    "url": child.spec.url,
                    "restarts": child.num_restarts,
                    "log": str(child.log_file),
                }
                for child in supervisor.children
            },
        }
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(state, file, indent=1)
        scratch.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
