"""Real services on free ports, each its own process, for tests that kill and restart them one by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import free_port

STOP_S_MAX = 20.0


@dataclass
class ServiceProcess:
    """One `python -m MODULE flags…`."""

    module: str
    flags: list[str]
    env: dict[str, str]
    log_file: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.flags], env=os.environ | self.env, stdout=log, stderr=log
            )

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill −9, and wait for the end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_S_MAX)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(
                f"{self.module} did not end on SIGTERM:\n{self.log_file.read_text()[-2000:]}"
            ) from None


@dataclass
class Worker:
    """A worker process and its HTTP face."""

    process: ServiceProcess
    url: str

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def post(self, path: str, body: object) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def is_ready(self) -> bool:
        try:
            self.get("/ready")
        except OSError:
            if self.process.process is not None and self.process.process.poll() is not None:
                raise AssertionError(f"worker ended:\n{self.process.log_file.read_text()[-3000:]}") from None
            return False
        return True

    def complete(self, prompt: list[int], max_tokens: int = 16, **fields: Any) -> Completion:
        """Greedy unless told otherwise."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}
        answer = self.post("/v1/completions", body)
        return Completion(answer["choices"][0]["token_ids"], answer["usage"], answer["kv_transfer_params"])

    def drop(self, *tiers: str) -> None:
        self.post("/cache/drop", {"tiers": list(tiers)})


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    usage: dict[str, Any]
    handover: dict[str, Any] | None

    @property
    def tiers(self) -> dict[str, int]:
        """Prompt tokens by source; sources that gave none are left out."""
        names = ("computed", "l1", "l2", "pool")
        return {name: self.usage["stratakv"][name] for name in names if self.usage["stratakv"][name]}


@dataclass
class Fleet:
    """A meta server, daemons and workers over one database."""

    database_url: str
    directory: Path
    env: dict[str, str] = field(default_factory=dict)
    processes: list[ServiceProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meta_port = free_port()
        self.env |= {"STRATAKV_DATABASE_URL": self.database_url, "STRATAKV_META_NATIVE_PORT": str(self.meta_port)}

    def _add(self, module: str, name: str, flags: list[str]) -> ServiceProcess:
        service = ServiceProcess(module, flags, self.env, self.directory / f"{name}.log")
        service.start()
        self.processes.append(service)
        return service

    def meta(self, *flags: str) -> ServiceProcess:
        return self._add("meta_server", "meta", list(flags))

    def daemon(self, node: str, *flags: str) -> ServiceProcess:
        return self._add("dmp", node, ["--node", node, "--port", str(free_port()), *flags])

    def worker(self, name: str, *flags: str) -> Worker:
        port = free_port()
        service = self._add(
            "workers", name, ["--name", name, "--port", str(port), "--dtype", "fp32", "--threads", "1", *flags]
        )
        return Worker(service, f"http://127.0.0.1:{port}")

    def stop(self) -> None:
        for service in reversed(self.processes):
            service.stop()
