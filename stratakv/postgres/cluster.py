"""One PostgreSQL cluster that lives and dies with the process that started it.

It listens on a Unix socket in a private directory only: whoever may enter that directory is trusted, there is no password
and no port. A lock beside the data makes sure that one process owns it; a server that outlived its owner is stopped first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

import psycopg

from stratakv.errors import SetupError
from stratakv.postgres.account import Account, Mode, choose_account
from stratakv.postgres.binaries import Binaries, find_binaries
from stratakv.settings import PostgresSettings

SUPERUSER = "postgres"
METADATA_DATABASE = "stratakv"
PORT = 5432
"""Unless the options say otherwise; only part of the socket's name."""
CONNECTIONS_MAX = 600
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.02
_SOCKET_PATH_BYTES_MAX = 80
"""The kernel's limit is 107; room is left for the socket's name and for `listener_dir`."""
_ROOT_PLACE = Path("/var/lib/stratakv")
"""Where root keeps what the server's account must reach but cannot under root's home."""
_BUILTIN_LOCALE_MAJOR = 17


class EmbeddedPostgres:
    """`with EmbeddedPostgres(settings.postgres, data_dir) as cluster: connect(cluster.url)`.

    Start it from a thread that lives as long as the cluster shall: the server ends when that thread does. With
    `throw_away` nothing is synced to disk and everything is removed at the end. `options` are further settings of the
    server; with `listen_addresses` among them it has a TCP port too, which lets everybody in.
    """

    def __init__(
        self,
        settings: PostgresSettings,
        data_dir: Path,
        socket_dir: Path | None = None,
        *,
        throw_away: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._home = data_dir.expanduser().absolute()
        self._socket_dir = socket_dir
        self._throw_away = throw_away
        self._options = dict(options or {})
        self._account: Account | None = None
        self._binaries: Binaries | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None
        self._cleanup = contextlib.ExitStack()

    @property
    def socket_dir(self) -> Path:
        """The private directory of its Unix socket."""
        assert self._socket_dir is not None, "not started"
        return self._socket_dir

    @property
    def port(self) -> int:
        """Part of the socket's name, and the TCP port if there is one."""
        return int(self._options.get("port", PORT))

    @property
    def uid(self) -> int:
        """The server's uid as SO_PEERCRED shows it to other processes."""
        assert self._account is not None, "not started"
        return self._account.outer_uid

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    def listener_dir(self) -> Path:
        """A directory for sockets that only the server's account, we and root can reach; made if it is missing."""
        directory = self.socket_dir / "infer"
        directory.mkdir(exist_ok=True)
        directory.chmod(0o711)
        return directory

    @property
    def log_file(self) -> Path:
        """What the server wrote."""
        return self._home / "postgres.log"

    @property
    def url(self) -> str:
        """The metadata database, as superuser."""
        return self.database_url(METADATA_DATABASE)

    def database_url(self, database: str) -> str:
        """Another database of the cluster, as superuser."""
        return f"postgresql://{SUPERUSER}@/{quote(database)}?host={quote(str(self.socket_dir))}&port={self.port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Make the cluster if there is none, start it, and make the metadata database. Raises SetupError."""
        binaries = find_binaries(self._settings.bin)
        self._account = choose_account()
        if not self._account.can_reach(self._home):
            self._home = _ROOT_PLACE / hashlib.sha256(str(self._home).encode()).hexdigest()[:12]
        if not self._account.can_reach(binaries.directory):
            _ROOT_PLACE.mkdir(mode=0o755, parents=True, exist_ok=True)
            binaries = binaries.copy_to(_ROOT_PLACE)
        self._take_home()
        self._end_orphan()
        self._make_socket_dir()
        self._binaries = binaries
        if not (self._data_dir / "PG_VERSION").exists():
            self._initialise(binaries)
        self._check_version(binaries)
        self._run_server(binaries)
        self._make_database()

    def is_running(self) -> bool:
        """Whether the server that was started is alive."""
        return self._process is not None and self._process.poll() is None

    def restart(self) -> None:
        """Start the server again after it died. Raises SetupError."""
        assert self._binaries is not None, "not started"
        self._end_orphan()
        self._run_server(self._binaries)
        self._make_database()

    def stop(self) -> None:
        """End the server: a fast shutdown, then harder. Safe to repeat."""
        if self._process is not None:
            _end(self._process.pid, lambda: self._process is None or self._process.poll() is not None)
            self._process.wait()
            self._process = None
        self._cleanup.close()
        if self._lock is not None:
            if self._throw_away:
                shutil.rmtree(self._home, ignore_errors=True)
            self._lock.close()
            self._lock = None

    @property
    def _data_dir(self) -> Path:
        return self._home / "data"

    def _take_home(self) -> None:
        """Make the directory and lock it for this process."""
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._give(self._home)
            self._lock = (self._home / "lock").open("a")
        except OSError as error:
            raise SetupError(f"{self._home} cannot be used for PostgreSQL's data: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            self._lock = None
            raise SetupError(
                f"Another process already runs the PostgreSQL in {self._home}.",
                hint="Stop it, or choose another directory with up.data_dir or meta.embedded_postgres.",
            ) from error

    def _end_orphan(self) -> None:
        """Stop a server that outlived its owner, and forget a pid file that names no server of ours."""
        pid_file = self._data_dir / "postmaster.pid"
        if not pid_file.exists():
            return
        first_line = pid_file.read_text().split("\n", 1)[0]
        running = _server_processes(self._data_dir)
        if first_line.isdecimal() and int(first_line) in running:
            _end(int(first_line), lambda: int(first_line) not in _server_processes(self._data_dir))
        # Backends end by themselves when the postmaster is gone; before that its pid file guards the shared memory.
        for pid in _server_processes(self._data_dir):
            _end(pid, lambda pid=pid: pid not in _server_processes(self._data_dir))  # type: ignore[misc]
        pid_file.unlink(missing_ok=True)

    def _make_socket_dir(self) -> None:
        if self._socket_dir is None:
            self._socket_dir = self._home / "socket"
            if len(os.fsencode(self._socket_dir)) > _SOCKET_PATH_BYTES_MAX:
                self._socket_dir = self._short_socket_dir()
        self._socket_dir.mkdir(mode=0o700, exist_ok=True)
        self._socket_dir.chmod(0o700)
        self._give(self._socket_dir)

    def _short_socket_dir(self) -> Path:
        """A directory that the next start finds again, should this one not get to remove it."""
        assert self._account is not None
        digest = hashlib.sha256(os.fsencode(self._home)).hexdigest()[:12]
        path = Path(tempfile.gettempdir()) / f"stratakv-{self._account.outer_uid}-{digest}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), self._account.outer_uid):
            raise SetupError(
                f"{path} belongs to somebody else.", hint="Choose a shorter up.data_dir or meta.embedded_postgres."
            )
        self._cleanup.callback(shutil.rmtree, path, ignore_errors=True)
        return path

    def _give(self, path: Path) -> None:
        """Let the server's account own `path`, if that is not ours."""
        assert self._account is not None
        if self._account.mode is Mode.ACCOUNT:
            os.chown(path, self._account.uid, self._account.gid)

    def _initialise(self, binaries: Binaries) -> None:
        """initdb into a scratch directory, renamed when whole."""
        assert self._account is not None
        scratch = self._home / "data.new"
        shutil.rmtree(scratch, ignore_errors=True)
        locale = ["--locale=C.UTF-8"]
        if binaries.major >= _BUILTIN_LOCALE_MAJOR:
            locale = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        arguments = [f"--pgdata={scratch}", f"--username={SUPERUSER}", "--encoding=UTF8", "--auth=trust", *locale]
        if self._throw_away:
            arguments.append("--no-sync")
        command = self._account.command(binaries.program("initdb"), *arguments)
        done = subprocess.run(
            command, capture_output=True, text=True, cwd="/", timeout=START_TIMEOUT_S * 4, check=False
        )
        if done.returncode != 0:
            raise SetupError(f"PostgreSQL's initdb failed in {self._home}: {done.stderr.strip()}")
        scratch.rename(self._data_dir)

    def _check_version(self, binaries: Binaries) -> None:
        major = int((self._data_dir / "PG_VERSION").read_text().strip())
        if major != binaries.major:
            raise SetupError(
                f"{self._data_dir} was made by PostgreSQL {major}, but {binaries.directory} holds {binaries.major}.",
                hint="Point STRATAKV_POSTGRES_BIN to that version, or choose another directory.",
            )

    def _run_server(self, binaries: Binaries) -> None:
        assert self._account is not None
        options = {
            "listen_addresses": "",
            "port": str(PORT),
            "unix_socket_directories": str(self.socket_dir),
            "unix_socket_permissions": "0700",
            "max_connections": str(CONNECTIONS_MAX),
        }
        if self._throw_away:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        options |= self._options
        flags = [text for name, value in options.items() for text in ("-c", f"{name}={value}")]
        command = self._account.command(binaries.program("postgres"), "-D", str(self._data_dir), *flags)
        with self.log_file.open("ab") as log:
            # A session of its own: Ctrl-C reaches the owner, which then stops the server in order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True
            )

    def _make_database(self) -> None:
        """Wait until the server answers; make the metadata database once."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with psycopg.connect(self.database_url("postgres"), autocommit=True) as connection:
                    known = connection.execute(
                        "SELECT FROM pg_database WHERE datname = %s", (METADATA_DATABASE,)
                    ).fetchone()
                    if known is None:
                        connection.execute(f"CREATE DATABASE {METADATA_DATABASE}")
                return
            except psycopg.OperationalError as error:
                if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                    raise SetupError(f"PostgreSQL did not start: {self._last_log_line()}") from error
            time.sleep(_POLL_S)

    def _last_log_line(self) -> str:
        lines = self.log_file.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it wrote nothing'} (see {self.log_file})"


def _server_processes(data_dir: Path) -> set[int]:
    """Live processes of a server on `data_dir`: they all work in that directory."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # ended meanwhile, or not ours
                if (entry / "cwd").readlink() == data_dir:
                    found.add(int(entry.name))
    return found


def _end(pid: int, ended: Callable[[], bool]) -> None:
    """Fast shutdown, then immediate, then kill."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            if ended():
                return
            time.sleep(_POLL_S)
