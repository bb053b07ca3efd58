"""Mooncake Store for comparison: its master, a process that provides the memory, and clients, over TCP.

As its users set it up: peer-to-peer handshake, pooled connections, registered buffers, batched zero-copy calls.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = "mooncake"
START_S_MAX = 30.0
STOP_S_MAX = 10.0
LOCAL_BUFFER_BYTES = 16 * 1024 * 1024
ENVIRONMENT = {"MC_TCP_ENABLE_CONNECTION_POOL": "1", "GLOG_minloglevel": "2", "MC_LOG_LEVEL": "ERROR"}
"""Without the connection pool it dials for every page, which costs it more than half of its speed."""


def with_environment() -> dict[str, str]:
    """Ours, and what its processes and clients read."""
    return {**os.environ, **ENVIRONMENT}


def version() -> str:
    """Of the package, whatever it is called for this machine."""
    names = importlib.metadata.packages_distributions().get(PACKAGE, [])
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names)))


def require() -> None:
    """Raises SystemExit that says how to install it."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise SystemExit("Mooncake is not installed here: make mooncake")


@contextmanager
def running_store(segment_bytes: int) -> Iterator[str]:
    """Master and provider; the master's address."""
    require()
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    address = f"127.0.0.1:{_free_port()}"
    environment = with_environment()
    flags = ["-rpc_port", address.rpartition(":")[2], "-metrics_port", str(_free_port())]
    master = subprocess.Popen(
        [str(Path(spec.origin).with_name("mooncake_master")), *flags, "-enable_metric_reporting=false"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    provider = None
    try:
        _await_port(address)
        provider = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks.mooncake import provide; provide()", address, str(segment_bytes)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert provider.stdout is not None
        if not any(line == b"ready\n" for line in provider.stdout):
            raise SystemExit(
                "Mooncake's provider did not start; it needs libibverbs1 and librdmacm1 of the distribution."
            )
        yield address
    finally:
        for process in (provider, master):
            if process is not None:
                _end(process)


def client(master: str, segment_bytes: int = 0) -> Any:
    """A store that is set up; it gives `segment_bytes` of its memory to others."""
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    name = f"127.0.0.1:{_free_port()}"
    if store.setup(name, "P2PHANDSHAKE", segment_bytes, LOCAL_BUFFER_BYTES, "tcp", "", master) != 0:
        raise SystemExit("Mooncake's client did not start.")
    return store


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(address: str) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.05)
    raise SystemExit("Mooncake's master did not start.")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def provide() -> None:
    """A process that lends memory until its input ends."""
    store = client(sys.argv[1], int(sys.argv[2]))
    os.write(1, b"\nready\n")
    sys.stdin.read()
    store.close()
