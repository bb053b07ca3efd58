"""Suites as their authors publish them, downloaded once into the user's cache, never into the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

DOWNLOAD_TIMEOUT_S = 300


class Missing(Exception):
    """A program or a download that a suite needs is not there; the message says how to get it."""


class SuiteFailed(Exception):
    """A suite told nothing, or did not end in its time; the message says where its log is."""


def cache() -> Path:
    """`~/.cache/stratakv/compat`, or below XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME")
    directory = (Path(base) if base else Path.home() / ".cache") / "stratakv" / "compat"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def python_source(package: str, version: str) -> Path:
    """The unpacked source package from the package index."""
    directory = cache() / f"{package}-{version}"
    if not directory.exists():
        scratch = _scratch(directory)
        flags = ["--no-deps", "--no-binary", package, "--no-build-isolation", "--quiet", "--dest", str(scratch)]
        run(
            [sys.executable, "-m", "pip", "download", *flags, f"{package}=={version}"],
            what=f"{package}'s source package",
        )
        _unpack(next(scratch.glob("*.tar.gz")), scratch)
        (scratch / f"{package}-{version}").rename(directory)
        shutil.rmtree(scratch)
    return directory


def python_package(name: str) -> Path:
    """A package that only a suite needs, installed into the cache: what to put on PYTHONPATH."""
    directory = cache() / f"package-{name}"
    if not directory.exists():
        scratch = _scratch(directory)
        run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(scratch), name],
            what=f"the package {name}",
        )
        scratch.rename(directory)
    return directory


def debian_source(package: str, version: str) -> Path:
    """The unpacked upstream tree of a Debian source package."""
    directory = cache() / f"{package}-{version}-source"
    if not directory.exists():
        scratch = _scratch(directory)
        apt = require("apt-get", "This suite needs a Debian or Ubuntu machine.")
        run(
            [apt, "source", "--download-only", "--quiet", f"{package}={version}"],
            what=f"Debian's source of {package} {version}",
            hint="Add deb-src to the machine's apt sources (Types: deb deb-src) and run apt-get update.",
            cwd=scratch,
        )
        _unpack(next(scratch.glob("*.orig.tar.*")), scratch)
        next(path for path in scratch.iterdir() if path.is_dir()).rename(directory)
        shutil.rmtree(scratch)
    return directory


def debian_package(package: str, version: str) -> Path:
    """Files of a Debian binary package, unpacked beside the system, not installed."""
    directory = cache() / f"{package}-{version}-files"
    if not directory.exists():
        scratch = _scratch(directory)
        apt = require("apt-get", "This suite needs a Debian or Ubuntu machine.")
        run(
            [apt, "download", "--quiet", f"{package}={version}"],
            what=f"the package {package}",
            hint="Run apt-get update.",
            cwd=scratch,
        )
        run(["dpkg-deb", "-x", str(next(scratch.glob("*.deb"))), str(scratch / "files")], what=f"unpacking {package}")
        (scratch / "files").rename(directory)
        shutil.rmtree(scratch)
    return directory


def require(program: str, hint: str) -> str:
    """The program's path. Raises Missing."""
    path = shutil.which(program)
    if path is None:
        raise Missing(f"{program} is not installed. {hint}")
    return path


def run(command: list[str], *, what: str, hint: str = "", cwd: Path | None = None) -> None:
    """Raises Missing."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise Missing(f"{what} is not to be had: {(done.stderr or done.stdout).strip()[-400:]} {hint}".strip())


def _scratch(directory: Path) -> Path:
    scratch = directory.with_name(f".{directory.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return scratch


def _unpack(archive: Path, directory: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(directory, filter="data")
