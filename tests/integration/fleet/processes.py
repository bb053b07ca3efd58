"""A fleet of real services on free ports, for tests that kill and restart them one by one."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stratakv.tenancy.values import OWNER_HEADER
from tests.service_process import ServiceProcess
from tests.support import free_port


@dataclass
class Worker:
    """A worker process and its HTTP face."""

    process: ServiceProcess
    url: str

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def post(self, path: str, body: object, **headers: str) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def is_ready(self) -> bool:
        try:
            self.get("/ready")
        except OSError:
            if self.process.has_ended():
                raise AssertionError(f"worker ended:\n{self.process.log_tail()}") from None
            return False
        return True

    def complete(self, prompt: list[int], max_tokens: int = 16, *, owner: int = 0, **fields: Any) -> Completion:
        """Greedy unless told otherwise."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}
        answer = self.post("/v1/completions", body, **{OWNER_HEADER: str(owner)})
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
        names = ("computed", "l1", "l2", "pool", "disk")
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
