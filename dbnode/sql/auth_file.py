"""Users whom the DB node authenticates itself: their SCRAM verifiers, from a file in PgBouncer's format.

    "ada" "SCRAM-SHA-256$4096:…"

A quote within quotes is doubled, a line that starts with `;` is a comment. Read at the start and on SIGHUP.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path

from dbnode.sql.scram import Verifier
from stratakv.errors import SetupError

_LINE = re.compile(r'\s*"((?:[^"]|"")+)"\s+"((?:[^"]|"")*)"\s*')
_FILE_BYTES_MAX = 16 * 1024 * 1024
_OTHERS = 0o007


class AuthFile:
    """The verifiers, by user."""

    def __init__(self, path: Path | None) -> None:
        """Raises SetupError."""
        self._path = path
        self._verifiers: Mapping[str, Verifier] = {}
        self.reload()

    def get(self, user: str) -> Verifier | None:
        """None: PostgreSQL authenticates the user."""
        return self._verifiers.get(user)

    def reload(self) -> None:
        """Read the file again; what is known stays if it is wrong. Raises SetupError."""
        if self._path is None:
            return
        try:
            found = self._path.stat()
            if stat.S_IMODE(found.st_mode) & _OTHERS:
                raise SetupError(f"sql.auth_file: {self._path} may be read by others", hint=f"chmod 600 {self._path}")
            if found.st_size > _FILE_BYTES_MAX:
                raise SetupError(f"sql.auth_file: {self._path} is larger than {_FILE_BYTES_MAX} bytes")
            self._verifiers = parse_auth_file(self._path.read_text())
        except OSError as error:
            raise SetupError(f"sql.auth_file: {self._path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise SetupError(f"sql.auth_file: {self._path} is not UTF-8") from error


def parse_auth_file(text: str) -> dict[str, Verifier]:
    """User → verifier. Raises SetupError that names the line, never what stands in it."""
    verifiers = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith(";"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise SetupError(f'sql.auth_file: line {number}: expected "user" "verifier"')
        user, secret = (part.replace('""', '"') for part in found.groups())
        try:
            verifiers[user] = Verifier.from_text(secret)
        except ValueError as error:
            raise SetupError(
                f'sql.auth_file: line {number}: the secret of "{user}" is no SCRAM-SHA-256 verifier',
                hint="Copy rolpassword from pg_authid; passwords and MD5 hashes do not work here.",
            ) from error
    return verifiers
