"""A small `stratakv up` for tests: free ports, a directory of its own, everything gone at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stratakv.up.instance import Instance, running_instance

_SMALL = {
    "STRATAKV_DMP_SEGMENT_BYTES": "64MiB",
    "STRATAKV_WORKER_L1_TOKENS": "4096",
    "STRATAKV_WORKER_THREADS": "1",
    "STRATAKV_WORKER_PROFILE_S": "0",
}


@contextmanager
def running_cluster(directory: Path, *options: str, loading: bool = False, **env: str) -> Iterator[Instance]:
    """`stratakv up --ports auto` in `directory`, ready; with `loading`, as soon as all its workers are processes."""
    with running_instance(
        *("--ports", "auto", *options),
        directory=directory,
        env=_environment() | _SMALL | env,
        is_started=_has_workers if loading else lambda instance: instance.is_ready,
    ) as instance:
        yield instance


def stratakv(instance: Instance, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the CLI that finds the instance by its state file."""
    command = [sys.executable, "-m", "stratakv.cli", *arguments, "--state-file", str(instance.state_file)]
    return subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=120, check=False)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("STRATAKV_")}


def _has_workers(instance: Instance) -> bool:
    services = instance.state.get("services", {}).values()
    workers = [service for service in services if service["kind"] == "workers"]
    return bool(workers) and all(worker["pid"] is not None for worker in workers)
