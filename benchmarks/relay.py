"""relay: what the DB node's relay costs, beside PgBouncer in session mode (the baseline) and a direct connection.

pgbench, select-only. All three are reached over TCP on 127.0.0.1; relay and PgBouncer reach the server over its Unix socket.
Each run measures all three, one after another. pgbench comes with the embedded PostgreSQL, PgBouncer from the distribution.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import Spread, parse_options, report
from benchmarks.sql import Face, running_face
from stratakv.postgres import find_binaries
from stratakv.postgres.account import choose_account
from stratakv.settings import PostgresSettings

CLIENTS = (1, 8, 32)
MODES = ("simple", "prepared")
SCALE = 10
RUNS, RUNS_QUICK = 5, 1
SECONDS, SECONDS_QUICK = 3, 1
START_TIMEOUT_S = 10.0
_TPS = re.compile(r"^tps = ([\d.]+)", re.MULTILINE)


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="numbers of clients")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=("simple", "extended", "prepared"))
    parser.add_argument("--seconds", type=int, help="of each measurement")
    parser.add_argument("--runs", type=int, help="of which the median is taken")


def main() -> int:
    options = parse_options(__doc__, options_of)
    seconds = options.seconds or (SECONDS_QUICK if options.quick else SECONDS)
    runs = options.runs or (RUNS_QUICK if options.quick else RUNS)
    port = free_port()
    server_options = {"listen_addresses": "127.0.0.1", "port": str(port)}
    with running_face(server_options) as face, pooler(face) as pooler_port:
        ports = {"relay": face.front.port, "pgbouncer": pooler_port, "direct": port}
        pgbench(port, "-i", "-q", "-s", str(SCALE))
        cells = [(mode, clients) for mode in options.modes for clients in options.clients]
        found: dict[tuple[str, int], dict[str, list[float]]] = {cell: {name: [] for name in ports} for cell in cells}
        for run in range(runs):
            for mode, clients in cells:
                for name in list(ports) if run % 2 == 0 else reversed(list(ports)):
                    found[mode, clients][name].append(transactions_per_s(ports[name], mode, clients, seconds))
    medians = {cell: {name: Spread.of(values).median for name, values in by.items()} for cell, by in found.items()}
    report(
        "relay",
        {
            "clients": list(options.clients),
            "scale": SCALE,
            "seconds": seconds,
            "runs": runs,
            "sockets": "client TCP loopback, server Unix",
            "quick": options.quick,
        },
        _by_cell({cell: Spread.of(by["relay"]).as_json(0) for cell, by in found.items()}),
        {
            name: _by_cell({cell: Spread.of(by[name]).as_json(0) for cell, by in found.items()})
            for name in ("pgbouncer", "direct")
        },
        {
            f"over_{name}": _by_cell({cell: round(by["relay"] / by[name], 2) for cell, by in medians.items()})
            for name in ("pgbouncer", "direct")
        },
    )
    return 0


def _by_cell(values: dict[tuple[str, int], Any]) -> dict[str, Any]:
    return {f"{mode}_{clients}": value for (mode, clients), value in values.items()}


def transactions_per_s(port: int, mode: str, clients: int, seconds: int) -> float:
    jobs = min(clients, os.cpu_count() or 1)
    output = pgbench(port, "-n", "-S", "-M", mode, "-c", str(clients), "-j", str(jobs), "-T", str(seconds))
    match = _TPS.search(output)
    if match is None:
        raise SystemExit(f"pgbench told no rate: {output}")
    return float(match[1])


def pgbench(port: int, *flags: str) -> str:
    program = find_binaries(PostgresSettings().bin).program("pgbench")
    command = [program, "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", *flags, "postgres"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise SystemExit(f"pgbench failed: {done.stderr}")
    return done.stdout


@contextmanager
def pooler(face: Face) -> Iterator[int]:
    """PgBouncer in front of the same server; its port."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise SystemExit("This benchmark needs PgBouncer: apt-get install pgbouncer")
    with tempfile.TemporaryDirectory(prefix="skv-") as name:
        directory, port = Path(name), free_port()
        directory.chmod(0o755)
        users = directory / "users.txt"
        users.write_text('"postgres" ""\n')
        configuration = directory / "pgbouncer.ini"
        configuration.write_text(
            _CONFIGURATION.format(host=face.cluster.socket_dir, server=face.cluster.port, port=port, users=users)
        )
        # As PostgreSQL's account: it refuses root too, and must reach the socket.
        command = choose_account().command(program, "-q", str(configuration))
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                _await_port(port, process)
                yield port
            finally:
                process.terminate()


_CONFIGURATION = """
[databases]
postgres = host={host} port={server} dbname=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = session
default_pool_size = 100
max_client_conn = 1000
ignore_startup_parameters = extra_float_digits
log_connections = 0
log_disconnections = 0
log_stats = 0
"""


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit("PgBouncer did not start")


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
