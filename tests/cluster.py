"""A running `stratakv up` for tests: free ports, a directory of its own, everything gone at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import eventually

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the tests need of it."""

    process: subprocess.Popen[bytes]
    directory: Path
    env: dict[str, str]

    @property
    def state(self) -> dict[str, Any]:
        """The state file as it is now."""
        found: dict[str, Any] = json.loads((self.directory / "state.json").read_text())
        return found

    @property
    def sql_port(self) -> int:
        return int(self.state["sql_port"])

    @property
    def rest_url(self) -> str:
        return str(self.state["rest_url"])

    def pid(self, service: str) -> int | None:
        """Process id of a service; None while it is down."""
        found: int | None = self.state["services"][service]["pid"]
        return found

    def stratakv(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the CLI against this cluster."""
        state = self.state
        ports = {
            "STRATAKV_SQL_PORT": str(state["sql_port"]),
            "STRATAKV_REST_PORT": state["rest_url"].rpartition(":")[2],
            "STRATAKV_META_NATIVE_PORT": str(state["meta_port"]),
        }
        command = [sys.executable, "-m", "stratakv.cli", *arguments]
        return subprocess.run(
            command, env={**self.env, **ports}, capture_output=True, text=True, timeout=120, check=False
        )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it and return its exit status. Safe to repeat."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def running_cluster(directory: Path, *options: str, loading: bool = False, **env: str) -> Iterator[Cluster]:
    """`stratakv up --ports auto` in `directory`, ready; with `loading`, as soon as all its workers are processes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STRATAKV_")}
    environment = {**inherited, "STRATAKV_DMP_SEGMENT_BYTES": "64MiB", "STRATAKV_WORKER_L1_TOKENS": "4096"}
    environment |= {"STRATAKV_WORKER_THREADS": "1", **env}
    command = [sys.executable, "-m", "stratakv.cli", "up", "--ports", "auto", "--data-dir", str(directory / "data")]
    command += ["--state-file", str(directory / "state.json"), *options]
    log_file = directory / "up.log"
    with log_file.open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    cluster = Cluster(process, directory, environment)
    try:
        started = _has_workers if loading else _is_ready
        eventually(lambda: started(cluster), timeout_s=START_TIMEOUT_S, what=f"stratakv up has started, see {log_file}")
        yield cluster
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            cluster.stop()
        if process.poll() is None:
            process.kill()
            process.wait()


def _has_workers(cluster: Cluster) -> bool:
    if not (cluster.directory / "state.json").exists():
        return False
    workers = [service for service in cluster.state["services"].values() if service["kind"] == "workers"]
    return all(worker["pid"] is not None for worker in workers)


def _is_ready(cluster: Cluster) -> bool:
    if cluster.process.poll() is not None:
        log = (cluster.directory / "up.log").read_text()
        raise AssertionError(f"stratakv up ended with status {cluster.process.returncode}:\n{log}")
    try:
        return bool(cluster.state["ready"])
    except FileNotFoundError:
        return False
