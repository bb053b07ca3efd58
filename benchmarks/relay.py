"""relay: what the DB node's relay costs, beside PgBouncer in session mode (the baseline) and a direct connection.

pgbench, select-only. All three are reached over TCP on 127.0.0.1; relay and PgBouncer reach the server over its Unix socket.
The relay is that of a SQL face with nothing beside it; `--db-node` measures a whole DB node's too. Each run measures all of
them, one after another. pgbench comes with the embedded PostgreSQL, PgBouncer from the distribution.
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
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import Spread, parse_options, report
from benchmarks.sql import Face, running_face
from stratakv.postgres import find_binaries
from stratakv.postgres.account import choose_account
from stratakv.settings import PostgresSettings
from stratakv.up.instance import scratch_instance

CLIENTS = (1, 8, 32)
MODES = ("simple", "prepared")
BASELINES = ("pgbouncer", "direct")
SCALE = 10
RUNS, RUNS_QUICK = 5, 1
SECONDS, SECONDS_QUICK = 3, 1
START_TIMEOUT_S = 10.0
Cell = tuple[str, int]
"""Query mode and number of clients."""
_TPS = re.compile(r"^tps = ([\d.]+)", re.MULTILINE)


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="numbers of clients")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=("simple", "extended", "prepared"))
    parser.add_argument("--seconds", type=int, help="of each measurement")
    parser.add_argument("--db-node", action="store_true", help="measure the DB node of a whole instance too")
    parser.add_argument("--runs", type=int, help="of which the median is taken")


def main() -> int:
    options = parse_options(__doc__, options_of)
    seconds = options.seconds or (SECONDS_QUICK if options.quick else SECONDS)
    runs = options.runs or (RUNS_QUICK if options.quick else RUNS)
    cells = [(mode, clients) for mode in options.modes for clients in options.clients]
    with reached(options) as ports:
        found: dict[str, dict[Cell, list[float]]] = {name: {cell: [] for cell in cells} for name in ports}
        for run in range(runs):
            for mode, clients in cells:
                for name in list(ports) if run % 2 == 0 else reversed(list(ports)):
                    found[name][mode, clients].append(transactions_per_s(ports[name], mode, clients, seconds))
    spreads = {name: {cell: Spread.of(values) for cell, values in by.items()} for name, by in found.items()}
    rates = {name: _by_cell({cell: spread.as_json(0) for cell, spread in by.items()}) for name, by in spreads.items()}
    ours = [name for name in ports if name not in BASELINES]
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
        {name: rates[name] for name in ours},
        {name: rates[name] for name in BASELINES},
        {
            f"{name}_over_{baseline}": _by_cell(
                {cell: round(spreads[name][cell].median / spreads[baseline][cell].median, 2) for cell in cells}
            )
            for name in ours
            for baseline in BASELINES
        },
    )
    return 0


@contextmanager
def reached(options: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Ports of one and the same server: its own, and those of what stands in front of it."""
    direct = free_port()
    with ExitStack() as stack:
        face = stack.enter_context(running_face({"listen_addresses": "127.0.0.1", "port": str(direct)}))
        pgbench(direct, "-i", "-q", "-s", str(SCALE))
        ports = {"relay": face.front.port, "pgbouncer": stack.enter_context(pooler(face)), "direct": direct}
        if options.db_node:
            settings = ("--set", f"database.url={face.cluster.url}", "--set", "sql.backend_trusted=true")
            ports["db_node"] = stack.enter_context(scratch_instance(*settings, quiet=options.json)).sql_port
        yield ports


def _by_cell(values: dict[Cell, Any]) -> dict[str, Any]:
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
