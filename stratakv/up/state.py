"""The state file of `stratakv up`: URLs and process ids as JSON, for scripts, tests and other commands; there while it runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratakv.backend import client_url
from stratakv.config import value_text
from stratakv.process import reachable_host
from stratakv.settings import Settings

if TYPE_CHECKING:
    from stratakv.up.supervisor import Supervisor

FILE_NAME = "up.json"
"""In the data directory, unless another place is named."""
_TOLD = {
    "database": ("url",),
    "model": ("name",),
    "meta": ("host", "native_port"),
    "sql": ("host", "port", "backend_url", "listener_host", "listener_port"),
    "rest": ("host", "port"),
    "up": ("data_dir",),
}
"""Settings by which other commands reach what runs."""


def running_state(path: Path) -> dict[str, Any] | None:
    """What the `stratakv up` that runs now wrote to `path`; None if none does."""
    try:
        state = dict(json.loads(path.read_text()))
        program = Path(f"/proc/{state['pid']}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError):
        return None
    return state if b"stratakv" in program else None  # else the process id is another's by now


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
            "sql_url": client_url(settings),
            "sql_port": settings.sql.port,
            "rest_url": f"http://{reachable_host(settings.rest.host)}:{settings.rest.port}",
            "meta_host": settings.meta.host,
            "meta_port": settings.meta.native_port,
            "database_url": str(settings.database.url),
            "database_pid": cluster.pid if cluster is not None and cluster.is_running() else None,
            "model": settings.model.name,
            "settings": self.told_settings(),
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

    def told_settings(self) -> dict[str, str]:
        """Name → text, for those who want to reach this instance."""
        return {
            f"{section}.{key}": value_text(getattr(getattr(self.settings, section), key))
            for section, keys in _TOLD.items()
            for key in keys
        }

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
