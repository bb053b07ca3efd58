"""vLLM's OpenAI server as a process, with KV events and, if wanted, the connector; and a relay that loses events on command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

import stratakv
from benchmarks.vllm_process import BLOCK_SIZE, VENV, vllm_environment
from tests.support import eventually, free_port

START_S_MAX = 240.0
STOP_S_MAX = 30.0


@dataclass
class OpenAiServer:
    """`vllm serve`, on 127.0.0.1."""

    log_file: Path
    port: int = field(default_factory=free_port)
    events_port: int = field(default_factory=free_port)
    replay_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(
        self, model: Path, directory: Path, *flags: str, core: int, connector: Mapping[str, Any] | None = None
    ) -> None:
        """Begin to start it; `is_ready` says when it has."""
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.events_port}",
            "replay_endpoint": f"tcp://*:{self.replay_port}",
        }
        command = [
            *(str(VENV / "bin/python"), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", "smollm2-135m"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"),
            *("--block-size", str(BLOCK_SIZE), "--prefix-caching-hash-algo", "sha256_cbor"),
            *("--num-gpu-blocks-override", "40", "--enable-prompt-tokens-details"),
            *("--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}'),
            *("--kv-events-config", json.dumps(events)),
            *(("--kv-transfer-config", json.dumps(connector)) if connector else ()),
            *flags,
        ]
        site = directory / "site"  # only this package: what else lies beside it must not get in the way of vLLM's own
        site.mkdir(exist_ok=True)
        if not (site / "stratakv").exists():
            (site / "stratakv").symlink_to(Path(str(stratakv.__file__)).parent)
        with self.log_file.open("ab") as log:
            env = vllm_environment(site) | {"VLLM_CPU_OMP_THREADS_BIND": str(core)}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def wait_ready(self) -> None:
        eventually(self._is_ready, timeout_s=START_S_MAX, what=f"vLLM at {self.url}")

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"vLLM ended:\n{self.log_file.read_text()[-4000:]}"
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
        except OSError:
            return False
        return True

    def complete(self, prompt: list[int], max_tokens: int, **more: object) -> list[int]:
        """Greedy, past any node."""
        fields = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True, **more}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            token_ids: list[int] = json.load(response)["choices"][0]["token_ids"]
        return token_ids

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{"))

    def kill(self) -> None:
        """kill -9, with its engine: they are one group."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.kill()


class LossyRelay:
    """Between a publisher and its subscribers: passes events on, or loses them."""

    def __init__(self, events: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._source = self._context.socket(zmq.SUB)
        self._source.subscribe(b"")
        self._source.connect(events)
        self._sink = self._context.socket(zmq.PUB)
        self.endpoint = f"tcp://127.0.0.1:{self._sink.bind_to_random_port('tcp://127.0.0.1')}"
        self.loses = False
        self.num_lost = 0
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="lossy-relay", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            if not self._source.poll(50):
                continue
            message = self._source.recv_multipart()
            if self.loses:
                self.num_lost += 1
            else:
                self._sink.send_multipart(message)

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self._context.destroy(linger=0)
