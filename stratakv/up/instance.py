"""`stratakv up` as a child process, for the demo, the benchmarks and tests: started, waited for, ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stratakv.errors import SetupError
from stratakv.launch import ending_with_us

START_S_MAX = 300.0
STOP_S_MAX = 90.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Instance:
    """A running `stratakv up`."""

    process: subprocess.Popen[bytes]
    state_file: Path

    @property
    def state(self) -> dict[str, Any]:
        """URLs, ports, and the processes as they are now."""
        return dict(json.loads(self.state_file.read_text()))

    def wait_ready(self) -> None:
        """Raises SetupError if it ends first or takes longer than START_S_MAX."""
        deadline = time.monotonic() + START_S_MAX
        while not (self.state_file.exists() and self.state["ready"]):
            if self.process.poll() is not None:
                raise SetupError(f"`stratakv up` ended with status {self.process.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise SetupError(f"`stratakv up` was not ready after {START_S_MAX:.0f} s")
            time.sleep(POLL_S)

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S_MAX)


@contextmanager
def running_instance(*options: str, quiet: bool = False) -> Iterator[Instance]:
    """`stratakv up OPTIONS`, ready; ended on leaving. Raises SetupError."""
    with tempfile.TemporaryDirectory(prefix="stratakv-") as directory:
        state_file = Path(directory) / "state.json"
        up = [sys.executable, "-m", "stratakv.cli", "up", "--state-file", str(state_file), *options]
        command = ending_with_us(signal.SIGTERM, up)
        instance = Instance(
            subprocess.Popen(command, stdout=subprocess.DEVNULL if quiet else None, start_new_session=True), state_file
        )
        try:
            instance.wait_ready()
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
