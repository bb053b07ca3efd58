"""A pool for engines of others: meta server and one daemon on a throw-away PostgreSQL, without workers and DB node."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stratakv.launch import ending_with_us
from stratakv.migrate import upgrade
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import PostgresSettings

STOP_S_MAX = 30.0


@contextmanager
def kv_pool(directory: Path, segment: str) -> Iterator[int]:
    """Port of the meta server, which may not listen yet."""
    with ExitStack() as stack:
        cluster = stack.enter_context(EmbeddedPostgres(PostgresSettings(), directory / "postgres", throw_away=True))
        url = cluster.database_url("postgres")
        upgrade(url)
        port = _free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith("STRATAKV_")}
        env |= {"STRATAKV_DATABASE_URL": url, "STRATAKV_META_NATIVE_PORT": str(port)}
        stack.enter_context(_service("meta_server", [], env, directory))
        stack.enter_context(_service("dmp", ["--port", str(_free_port()), "--segment-bytes", segment], env, directory))
        yield port


@contextmanager
def _service(module: str, flags: list[str], env: dict[str, str], directory: Path) -> Iterator[None]:
    command = ending_with_us(signal.SIGTERM, [sys.executable, "-m", module, *flags])
    with (directory / f"{module}.log").open("ab") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
