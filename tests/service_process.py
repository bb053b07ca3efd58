"""A service as a process of its own, for tests that kill and restart it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_S_MAX = 30.0
LOG_TAIL_CHARS = 3000


class ServiceProcess:
    """`python -m MODULE FLAGS…`, whose output goes into `log_file`. Nothing runs before `start`."""

    process: subprocess.Popen[bytes]

    def __init__(self, module: str, flags: Sequence[str], env: Mapping[str, str], log_file: Path) -> None:
        self.log_file = log_file
        self._command = [sys.executable, "-m", module, *flags]
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", "STRATAKV_WORKER_PROFILE_S": "0", **env}

    def start(self) -> None:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def log(self) -> str:
        """All it has said."""
        return self.log_file.read_text()

    def log_tail(self) -> str:
        return self.log()[-LOG_TAIL_CHARS:]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit status; it fails if that takes long."""
        try:
            return self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"{self._command} did not end:\n{self.log_tail()}") from None

    def kill(self) -> None:
        """kill -9, and wait for the end. Safe to repeat."""
        self.process.kill()
        self.process.wait(STOP_S_MAX)

    def stop(self) -> int:
        """SIGTERM; the exit status. Safe to repeat."""
        self.process.terminate()
        return self.wait()
