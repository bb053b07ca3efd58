"""What `benchmarks.meta` asks: a meta server of its own on a throw-away PostgreSQL, and pools of nominal pages in it.

The pages have keys and places and no bytes: a meta server never sees any.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from stratakv import migrate
from stratakv.keys import KEY_BYTES
from stratakv.pool.meta_client import MetaClient
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import MetaSettings, PostgresSettings
from stratakv.wire import (
    PUT_ID_BYTES,
    Done,
    Extent,
    GetStats,
    PutEnd,
    PutGrant,
    PutStart,
    Registered,
    RegisterNode,
    RegisterWorker,
    Segment,
    Stats,
    WorkerInfo,
    WorkerRole,
)

NAMESPACE = b"n" * 16
PAGE_BYTES = 4096
BLOCK_TOKENS = 16
START_S_MAX = 60.0
SEGMENT_BYTES = 1 << 40
REQUEST_S_MAX = 60.0
SETTLE_S_MAX = 600.0
_UNFILLED = "SELECT count(*) FROM stratakv.put_sessions WHERE state = 'committed' AND NOT filled"


@dataclass
class MetaServer:
    """`python -m meta_server`, started and stopped at will."""

    url: str
    directory: Path
    port: int
    http_port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def _log(self) -> Path:
        return self.directory / "meta.log"

    def start(self) -> None:
        """Start it; `client` waits until it answers."""
        flags = [f"--native-port={self.port}", "--heartbeat-s=3600", "--put-timeout-s-max=600", "--kvcm-enabled=true"]
        flags += [f"--kvcm-http-port={self.http_port}", f"--kvcm-file-dir={self.directory / 'kvcm'}"]
        flags += [f"--{name}-port=0" for name in ("kvcm-grpc", "admin-grpc", "admin-http")]
        environment = {**os.environ, "STRATAKV_DATABASE_URL": self.url, "STRATAKV_LOG_FORMAT": "json"}
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "meta_server", *flags]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(START_S_MAX)
            self.process = None

    def rebuild_s(self) -> float:
        """How long its index took at its start, by its own log."""
        entries = (json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{"))
        return next(float(entry["seconds"]) for entry in entries if entry.get("event") == "index_rebuilt")

    def settle(self) -> None:
        """Wait until the tables of blocks are filled, which the server does behind its answers."""
        with psycopg.connect(self.url.replace("+asyncpg", ""), autocommit=True) as connection:
            deadline = time.monotonic() + SETTLE_S_MAX
            while connection.execute(_UNFILLED).fetchone() != (0,):
                if time.monotonic() > deadline:
                    raise SystemExit("the meta server does not finish filling its tables")
                time.sleep(0.1)

    def resident_bytes(self) -> int:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

    async def client(self) -> MetaClient:
        """Connected, as soon as it answers."""
        settings = MetaSettings(native_port=self.port, request_timeout_s=REQUEST_S_MAX)
        client = MetaClient(settings, role="benchmark", name="benchmark")
        deadline = time.monotonic() + START_S_MAX
        while not client.available and not await client.start():
            if time.monotonic() > deadline or (self.process is not None and self.process.poll() is not None):
                raise SystemExit(f"the meta server did not start:\n{self._log.read_text()[-2000:]}")
            await asyncio.sleep(0.05)
        return client


@contextmanager
def running_meta() -> Iterator[MetaServer]:
    """One with an empty index."""
    with tempfile.TemporaryDirectory(prefix="skv-") as name:
        directory = Path(name)
        with EmbeddedPostgres(PostgresSettings(), directory / "pg", throw_away=False) as cluster:
            migrate.upgrade(cluster.url)
            server = MetaServer(cluster.url, directory, _free_port(), _free_port())
            server.start()
            try:
                yield server
            finally:
                server.stop()


@dataclass
class Pool:
    """One nominal daemon, and its pages."""

    client: MetaClient
    segment: Segment = field(
        default_factory=lambda: Segment("dmp-0", os.urandom(16), "127.0.0.1", 1, "stratakv-bench", SEGMENT_BYTES)
    )
    keys: list[bytes] = field(default_factory=list)
    """Of each put, packed."""
    _places: Iterator[int] = field(default_factory=itertools.count)

    async def open(self) -> None:
        """Register the daemon, and a worker beside it."""
        await self.client.call(RegisterNode(self.segment), Registered)
        worker = WorkerInfo(
            "w", os.urandom(16), "http://127.0.0.1:1", WorkerRole.BOTH, "m", NAMESPACE, BLOCK_TOKENS, 1 << 20, "dmp-0"
        )
        await self.client.call(RegisterWorker(worker), Registered)

    async def put(self, num_blocks: int) -> float:
        """One two-phase write; its seconds from the first message to the last answer, without the making of keys."""
        keys, put_id = os.urandom(num_blocks * KEY_BYTES), os.urandom(PUT_ID_BYTES)
        began = time.perf_counter()
        start = PutStart(put_id, NAMESPACE, keys, PAGE_BYTES, BLOCK_TOKENS, timeout_s=600)
        grant = await self.client.call(start, PutGrant)
        assert len(grant.wanted) == num_blocks, "the meta server did not want all blocks"
        extents = [Extent(next(self._places) * PAGE_BYTES, 1) for _ in range(num_blocks)]
        await self.client.call(PutEnd(put_id, self.segment.epoch, extents), Done)
        self.keys.append(keys)
        return time.perf_counter() - began

    async def num_blocks(self) -> int:
        return (await self.client.call(GetStats(), Stats)).blocks


class HostStates:
    """Asks GetHostCacheState over HTTP/1.1, on one connection of its own: Python's HTTP clients take longer than the server."""

    def __init__(self, server: MetaServer) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.http_port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self, keys: bytes) -> bytes:
        """For packed keys; 64-bit numbers are strings, as protobuf prints them."""
        low = [
            str(int.from_bytes(keys[i + KEY_BYTES - 8 : i + KEY_BYTES], "big", signed=True))
            for i in range(0, len(keys), KEY_BYTES)
        ]
        fields = {"trace_id": "", "instance_id": f"stratakv-{NAMESPACE.hex()}", "block_cache_keys": low}
        body = json.dumps(fields).encode()
        head = "POST /api/getHostCacheState HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def ask(self, request: bytes) -> dict[str, Any]:
        self._socket.sendall(request)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._receive()
        head, _, body = received.partition(b"\r\n\r\n")
        lines = (line.partition(b":") for line in head.lower().splitlines()[1:])
        size = next(int(value) for name, _, value in lines if name == b"content-length")
        while len(body) < size:
            body += self._receive()
        answer: dict[str, Any] = json.loads(body)
        return answer

    def close(self) -> None:
        self._socket.close()

    def _receive(self) -> bytes:
        if not (received := self._socket.recv(65_536)):
            raise SystemExit("the meta server has closed the connection")
        return received


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
