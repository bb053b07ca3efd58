"""A throw-away PostgreSQL of the distribution that lets nobody in without SCRAM, on a port of its own."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from stratakv.postgres.account import Account, Mode
from tests.support import eventually, free_port


@dataclass(frozen=True, slots=True)
class DebianServer:
    """Where it is; its superuser is `postgres`."""

    port: int
    socket_dir: Path
    password: str

    @property
    def url(self) -> str:
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/postgres"


def _account() -> Account:
    """PostgreSQL's own account if we are root, else ours."""
    if os.geteuid() != 0:
        return Account(Mode.PLAIN, os.geteuid(), os.getegid())
    entry = pwd.getpwnam("postgres")
    return Account(Mode.ACCOUNT, entry.pw_uid, entry.pw_gid)


@contextmanager
def debian_server(
    home: Path, password: str, settings: Mapping[str, str] | None = None, files: Sequence[Path] = ()
) -> Iterator[DebianServer]:
    """A new cluster in `home`; `files` are given to its account. Skips where the distribution's server is missing."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not programs:
        pytest.skip("no PostgreSQL server of the distribution is installed")
    account = _account()
    for directory in (home, *home.parents[:3]):  # pytest's directories let nobody but us through
        mode = directory.stat().st_mode
        if mode & 0o011 != 0o011:
            directory.chmod(mode | 0o011)
    data = home / "data"
    data.mkdir(mode=0o700)
    password_file = home / "password"
    password_file.write_text(password)
    for path in (data, password_file, *files):
        os.chown(path, account.uid, account.gid)
    flags = ["-D", str(data), "-U", "postgres", "-A", "scram-sha-256", f"--pwfile={password_file}", "-N", "-E", "UTF8"]
    initdb = account.command(str(programs[-1] / "initdb"), *flags, "--locale=C.UTF-8")
    subprocess.run(initdb, check=True, capture_output=True, cwd="/")
    running = DebianServer(free_port(), data, password)
    all_settings = {
        "port": str(running.port),
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": str(data),
        "fsync": "off",
        **(settings or {}),
    }
    options = [f"-c{name}={value}" for name, value in all_settings.items()]
    server = account.command(str(programs[-1] / "postgres"), "-D", str(data), *options)
    log = home / "postgres.log"
    with log.open("wb") as output, subprocess.Popen(server, stdout=output, stderr=output, cwd="/") as process:
        try:
            eventually(lambda: process.poll() is None and _answers(running.url), what=f"PostgreSQL started, see {log}")
            yield running
        finally:
            process.terminate()
            process.send_signal(2)


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True
