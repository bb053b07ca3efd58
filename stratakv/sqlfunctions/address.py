"""Where a DB node's private listener is, and the key that PostgreSQL shows there.

Both sides make it from the same settings: the installer writes it into the owner-only table, the listener opens it.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from stratakv.errors import SetupError
from stratakv.process import is_loopback
from stratakv.settings import SqlSettings

LISTENER_USER = "stratakv"
CONNECT_TIMEOUT_S = 5
KEY_FILE = "listener.key"
_KEY_BYTES = 32
_SOCKET_PATH_BYTES_MAX = 107
_NO_TLS = {"sslmode": "disable"}
_REQUIRE_AUTH_SINCE = 160_000
# The listener's certificate is its own work. Who shows it is proved by SCRAM, which is bound to it: nobody between can know
# the key. So no root certificate is needed on PostgreSQL's host, and what lies in its account's home must not be tried.
_NO_FILE = "/dev/null/none"
_BOUND_TLS = {"sslmode": "require", "channel_binding": "require", "sslrootcert": _NO_FILE, "sslcert": _NO_FILE}


@dataclass(frozen=True, slots=True)
class ListenerAddress:
    """A directory with a Unix socket, or a TCP address; `key` is a password."""

    host: str
    port: int
    key: str = field(repr=False)
    tls: bool = False
    """Only over TCP."""

    @classmethod
    def from_settings(cls, settings: SqlSettings) -> ListenerAddress:
        """Of the DB node that runs with `settings`. Makes the key of a listener_dir on first use. Raises SetupError."""
        if settings.listener_dir is not None:
            directory = settings.listener_dir.expanduser().absolute()
            # PostgreSQL's account must reach the socket; the key stays ours.
            key = settings.listener_key or kept_key(directory, mode=0o711)
            address = cls(str(directory), settings.listener_port, str(key))
            if len(os.fsencode(address.socket_path or "")) > _SOCKET_PATH_BYTES_MAX:
                raise SetupError(f"sql.listener_dir: {directory} is too long for a Unix socket's path")
            return address
        if not settings.listener_key:
            raise SetupError(
                "infer() has nowhere to call back to",
                hint="Set sql.listener_dir for a PostgreSQL on this host, else sql.listener_key (any long random text), the"
                f" same for the DB node and for `stratakv install`; `stratakv up` keeps a key in up.data_dir/{KEY_FILE}"
                " when it runs with a database of yours.",
            )
        host = settings.listener_host
        tls = not is_loopback(host) if settings.listener_tls is None else settings.listener_tls
        return cls(host, settings.listener_port, str(settings.listener_key), tls)

    @property
    def name(self) -> str:
        """What the table of listeners calls it."""
        return f"{self.host}:{self.port}"

    @property
    def socket_path(self) -> str | None:
        """The Unix socket, where libpq expects it; None for TCP."""
        return f"{self.host}/.s.PGSQL.{self.port}" if self.host.startswith("/") else None

    def conninfo(self, server_version: int) -> str:
        """What dblink connects to, in a PostgreSQL of that version.

        Whoever listens there while no DB node does must learn neither prompts nor the key, so only SCRAM is answered. Before
        version 16 only TLS can say so.
        """
        parts = {
            "host": self.host,
            "port": str(self.port),
            "user": LISTENER_USER,
            "dbname": LISTENER_USER,
            "password": self.key,
            "connect_timeout": str(CONNECT_TIMEOUT_S),
            "gssencmode": "disable",
            **(_BOUND_TLS if self.tls else _NO_TLS),
        }
        if server_version >= _REQUIRE_AUTH_SINCE:
            parts["require_auth"] = "scram-sha-256"
        return " ".join(f"{name}={_quoted(value)}" for name, value in parts.items())


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def kept_key(directory: Path, *, mode: int = 0o700) -> str:
    """The key in the directory's key file; both are made if they are missing. Raises SetupError."""
    path = directory / KEY_FILE
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return _read_key(path)
        with os.fdopen(descriptor, "w") as file:
            key = secrets.token_urlsafe(_KEY_BYTES)
            file.write(key)
        return key
    except OSError as error:
        raise SetupError(f"the key of the private listener: {path}: {error.strerror}") from error


def _read_key(path: Path) -> str:
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise SetupError(f"{path} may be read by others", hint=f"chmod 600 {path}")
    key = path.read_text().strip()
    if not key:
        raise SetupError(f"{path} is empty", hint="remove it and start again")
    return key
