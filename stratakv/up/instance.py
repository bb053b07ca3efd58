"""`stratakv up` as a child process, for the demo, the benchmarks and tests: started, waited for, ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stratakv.errors import SetupError
from stratakv.launch import ending_with_us

START_S_MAX = 300.0
STOP_S_MAX = 90.0
POLL_S = 0.1
LOG_TAIL_BYTES = 4000


@dataclass(frozen=True, slots=True)
class Instance:
    """A `stratakv up` of ours."""

    process: subprocess.Popen[bytes]
    state_file: Path
    log_file: Path | None = None

    @property
    def state(self) -> dict[str, Any]:
        """URLs, ports, and the processes as they are now; empty before there is any."""
        try:
            state: dict[str, Any] = json.loads(self.state_file.read_text())
        except FileNotFoundError:
            return {}
        return state if state["pid"] == self.process.pid else {}  # else one that was killed left it there

    @property
    def is_ready(self) -> bool:
        return bool(self.state.get("ready"))

    @property
    def sql_port(self) -> int:
        return int(self.state["sql_port"])

    @property
    def rest_url(self) -> str:
        return str(self.state["rest_url"])

    def pid(self, service: str) -> int | None:
        """Process id of a service; None while it is down."""
        found: int | None = self.state["services"][service]["pid"]
        return found

    def wait(self, is_started: Callable[[Instance], bool]) -> None:
        """Raises SetupError if it ends first or takes longer than START_S_MAX."""
        deadline = time.monotonic() + START_S_MAX
        while not is_started(self):
            if self.process.poll() is not None:
                raise SetupError(
                    f"`stratakv up` ended with status {self.process.returncode} before it was ready{self._log_tail()}"
                )
            if time.monotonic() > deadline:
                raise SetupError(f"`stratakv up` was not ready after {START_S_MAX:.0f} s{self._log_tail()}")
            time.sleep(POLL_S)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it, at the latest after STOP_S_MAX; its exit status. Safe to repeat."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _log_tail(self) -> str:
        if self.log_file is None:
            return ""
        return f":\n{self.log_file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors='replace')}"


@contextmanager
def running_instance(
    *options: str,
    directory: Path | None = None,
    env: Mapping[str, str] | None = None,
    quiet: bool = False,
    is_started: Callable[[Instance], bool] = lambda instance: instance.is_ready,
) -> Iterator[Instance]:
    """`stratakv up OPTIONS`, ready; ended on leaving. Raises SetupError.

    In `directory` are its data, its state file and, as `up.log`, its output. Without one the data directory is that of the
    settings, and it writes where we do, if `quiet` to standard error only.
    """
    with ExitStack() as stack:
        place = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stratakv-")))
        state_file = place / "state.json"
        up = [sys.executable, "-m", "stratakv.cli", "up", "--state-file", str(state_file)]
        log_file = None
        output: IO[bytes] | int | None = subprocess.DEVNULL if quiet else None
        errors: IO[bytes] | None = None
        if directory is not None:
            up += ["--data-dir", str(directory / "data")]
            log_file = directory / "up.log"
            output = errors = stack.enter_context(log_file.open("ab"))
        command = ending_with_us(signal.SIGTERM, [*up, *options])
        process = subprocess.Popen(command, env=env, stdout=output, stderr=errors, start_new_session=True)
        instance = Instance(process, state_file, log_file)
        try:
            instance.wait(is_started)
            yield instance
        finally:
            instance.stop()


@contextmanager
def scratch_instance(*options: str, quiet: bool = False) -> Iterator[Instance]:
    """As `running_instance`, on free ports and with a data directory that goes with it."""
    with (
        tempfile.TemporaryDirectory(prefix="stratakv-data-") as data_dir,
        running_instance("--ports", "auto", "--data-dir", data_dir, *options, quiet=quiet) as instance,
    ):
        yield instance
