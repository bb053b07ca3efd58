"""A vLLM engine in its own environment (`make vllm-venv`) as a child process; see `benchmarks.vllm_driver`.

Both sides of a comparison must be configured alike, and in full: without VLLM_CPU_OMP_THREADS_BIND vLLM computes on one core, and
on two as soon as a connector is configured.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import stratakv
from stratakv.errors import SetupError

VENV = Path(os.environ.get("VLLM_VENV", "~/.cache/stratakv/vllm")).expanduser()
BLOCK_SIZE = 128
"""Its attention on the CPU needs multiples of 32."""
START_S_MAX = 180.0
ANSWER_S_MAX = 300.0
STOP_S_MAX = 30.0


@dataclass(slots=True)
class Completion:
    """One request's answer, as far as it has come."""

    asked_at: float
    token_ids: list[int] = field(default_factory=list)
    first_at: float = 0.0
    done_at: float = 0.0
    cached_tokens: int = 0
    """Of the prompt, by vLLM's own prefix cache and the pool together."""
    outcome: str = ""
    """`whole`, `aborted` or `failed: …`; empty while it runs."""
    changed: threading.Condition = field(default_factory=threading.Condition, repr=False)

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.asked_at

    def wait(self) -> Completion:
        """Until it has ended."""
        return self._wait_for(lambda: bool(self.outcome))

    def wait_first(self) -> Completion:
        """Until its first token, or its end."""
        return self._wait_for(lambda: bool(self.outcome or self.token_ids))

    def _wait_for(self, is_met: Any) -> Completion:
        with self.changed:
            if not self.changed.wait_for(is_met, ANSWER_S_MAX):
                raise TimeoutError(f"no answer within {ANSWER_S_MAX:g} s")
        return self


class VllmProcess:
    """One engine. Its log goes into a file."""

    def __init__(self, process: subprocess.Popen[bytes], events: IO[bytes], log_file: Path) -> None:
        self.process = process
        self.log_file = log_file
        self._events = events
        self._completions: dict[str, Completion] = {}
        self._numbers = iter(range(1 << 31))
        self._resets: queue.Queue[bool] = queue.Queue()
        self._ready = threading.Event()
        threading.Thread(target=self._read, name="vllm-events", daemon=True).start()

    def wait_ready(self) -> None:
        if not self._ready.wait(START_S_MAX) or self.process.poll() is not None:
            raise SetupError(f"vLLM did not start:\n{self.log_file.read_text()[-4000:]}")

    def start(self, prompt: Sequence[int], max_tokens: int, salt: str = "", at: float = 0.0) -> tuple[str, Completion]:
        """Send a request; its name, and its answer as it comes. `at`: when it counts as asked."""
        name = f"r{next(self._numbers)}"
        completion = self._completions[name] = Completion(at or time.monotonic())
        self._send(op="generate", id=name, prompt=list(prompt), max_tokens=max_tokens, salt=salt)
        return name, completion

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, salt: str = "") -> list[Completion]:
        """All at once; their answers when all are there."""
        started = [self.start(prompt, max_tokens, salt)[1] for prompt in prompts]
        return [completion.wait() for completion in started]

    def abort(self, name: str) -> None:
        self._send(op="abort", id=name)

    def reset(self) -> bool:
        """Forget vLLM's own prefix cache; False if any block is in use."""
        self._send(op="reset")
        return self._resets.get(timeout=ANSWER_S_MAX)

    def stop(self) -> None:
        """Let it end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """kill -9, with its engine's processes: they are one group."""
        os.killpg(self.process.pid, 9)
        self.process.wait()

    def _send(self, **command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def _read(self) -> None:
        for line in self._events:
            event = json.loads(line)
            if "ready" in event:
                self._ready.set()
            elif "reset" in event:
                self._resets.put(event["reset"])
            else:
                self._take(self._completions[event["id"]], event)
        self._ready.set()
        for completion in self._completions.values():
            with completion.changed:
                completion.outcome = completion.outcome or "failed: the engine has gone"
                completion.changed.notify_all()

    def _take(self, completion: Completion, event: Mapping[str, Any]) -> None:
        with completion.changed:
            if event.get("tokens"):
                completion.first_at = completion.first_at or event["at"]
                completion.token_ids += event["tokens"]
            if "done" in event:
                completion.outcome = event["done"]
                completion.done_at = event["at"]
                completion.cached_tokens = event["cached"]
            completion.changed.notify_all()


def connector_config(meta_port: int, **extra: object) -> dict[str, Any]:
    """`kv_transfer_config` of the connector on a local pool."""
    return {
        "kv_connector": "StrataKVConnector",
        "kv_connector_module_path": "stratakv.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"meta": f"tcp://127.0.0.1:{meta_port}", **extra},
    }


@contextmanager
def vllm_engine(
    directory: Path, name: str, *, kv_cache_gib: int = 1, env: Mapping[str, str] | None = None, **arguments: object
) -> Iterator[VllmProcess]:
    """An engine with these arguments of vLLM's (`AsyncEngineArgs`). Raises SetupError if there is no vLLM."""
    python = VENV / "bin/python"
    if not python.exists():
        raise SetupError(f"there is no vLLM in {VENV}", hint="make vllm-venv builds its environment.")
    site = directory / "site"
    site.mkdir(exist_ok=True)
    package = Path(str(stratakv.__file__)).parent
    if not (site / "stratakv").exists():
        # Only this package: what else lies beside it must not get in the way of vLLM's own.
        (site / "stratakv").symlink_to(package)
    log_file = directory / f"{name}.log"
    reading, writing = os.pipe()
    defaults: dict[str, object] = {
        "block_size": BLOCK_SIZE,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "prefix_caching_hash_algo": "sha256_cbor",
        "seed": 0,
        "disable_log_stats": True,
    }
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [python, Path(__file__).with_name("vllm_driver.py"), str(writing), json.dumps(defaults | arguments)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=vllm_environment(site, kv_cache_gib) | dict(env or {}),
            pass_fds=[writing],
            start_new_session=True,
        )
    os.close(writing)
    engine = VllmProcess(process, os.fdopen(reading, "rb"), log_file)
    try:
        engine.wait_ready()
        yield engine
    finally:
        if process.poll() is None:
            engine.stop()


def vllm_environment(site: Path, kv_cache_gib: int = 1) -> dict[str, str]:
    left_out = ("PYTHON", "STRATAKV_", "OMP_", "VLLM_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    openmp = next(VENV.glob("lib/libiomp5.so"), None)
    cores = sorted(os.sched_getaffinity(0))
    return env | {
        "PYTHONPATH": str(site),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        **({"LD_PRELOAD": str(openmp)} if openmp else {}),
    }
