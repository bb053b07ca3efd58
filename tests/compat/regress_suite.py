"""PostgreSQL's regression files, run by pg_regress against the distribution's server; their printed results are compared.

Files and the C functions they load come from Debian's source package of the version that is installed.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path

from tests.compat.outcomes import Outcome, Result, Results
from tests.compat.sources import Missing, SuiteFailed, cache, debian_package, debian_source, require, run
from tests.compat.target import Target

MAJOR = 15
BIN = Path(f"/usr/lib/postgresql/{MAJOR}/bin")
TIMEOUT_S = 900
_SHIPPED_LIBRARIES = ("autoinc.so", "refint.so")
"""Part of the server's package; the tests look for them beside regress.so."""
_PROGRAM = BIN.parent / "lib" / "pgxs" / "src" / "test" / "regress" / "pg_regress"
_LINE = re.compile(r"^(?:test |     )(\S+)\s+\.\.\. (ok|FAILED|failed \(ignored\))", re.MULTILINE)


def run_suite(target: Target, directory: Path) -> Results:
    version = _version()
    source = debian_source(f"postgresql-{MAJOR}", version)
    library = _library(source, version)
    inputs, outputs = directory / "inputs", directory / "outputs"
    shutil.copytree(source / "src/test/regress", inputs)
    (outputs / "testtablespace").mkdir(parents=True)
    for path in (directory, inputs, outputs, *outputs.iterdir()):
        path.chmod(0o777)  # the server's account reads and writes here too
    flags = [f"--inputdir={inputs}", f"--outputdir={outputs}", f"--dlpath={library.parent}", f"--bindir={BIN}"]
    flags += [f"--schedule={inputs}/parallel_schedule", "--max-connections=8", f"--host={target.host}"]
    command = [str(_PROGRAM), *flags, f"--port={target.port}", f"--user={target.user}", "--dbname=regression"]
    log = directory / "pg_regress.log"
    with log.open("wb") as output, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=outputs, stdout=output, stderr=output, timeout=TIMEOUT_S, check=False)
    found = {}
    for name, word in _LINE.findall(log.read_text()):
        printed = outputs / "results" / f"{name}.out"
        text = printed.read_text(errors="surrogateescape") if printed.exists() else ""
        found[name] = Result(Outcome.PASSED if word == "ok" else Outcome.FAILED, text.replace(str(directory), "DIR"))
    if not found:
        raise SuiteFailed(f"pg_regress ran no test, see {log}")
    return found


def _version() -> str:
    """Of the server that is installed: files of another release expect other results."""
    if not (BIN / "postgres").exists() or not _PROGRAM.exists():
        raise Missing(f"PostgreSQL {MAJOR} of the distribution is not installed: apt-get install postgresql-{MAJOR}")
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", f"postgresql-{MAJOR}"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _library(source: Path, version: str) -> Path:
    """regress.so, compiled once; the server's headers come from Debian's package, which need not be installed."""
    library = cache() / f"{source.name}-library" / "regress.so"
    if not library.exists():
        compiler = require("gcc", "apt-get install gcc libc6-dev")
        package = debian_package(f"postgresql-server-dev-{MAJOR}", version)
        headers = package / "usr/include/postgresql" / str(MAJOR) / "server"
        library.parent.mkdir(exist_ok=True)
        flags = ["-O1", "-fPIC", "-shared", "-w", f"-I{headers}", f"-I{source}/src/include", "-o", str(library)]
        run([compiler, *flags, str(source / "src/test/regress/regress.c")], what="regress.so")
        for name in _SHIPPED_LIBRARIES:
            (library.parent / name).symlink_to(BIN.parent / "lib" / name)
    return library
