"""One supervised service process: starts it, watches it, starts it again when it dies, ends it.

The process gets SIGKILL when the supervisor dies, whatever killed that; services keep nothing that a kill could harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from stratakv.errors import SetupError
from stratakv.launch import ending_with_us
from stratakv.log import EventLogger
from stratakv.process import EXIT_SETUP
from stratakv.up.plan import ServiceSpec

log = EventLogger("stratakv.up")

RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
"""More than RESTARTS_MAX deaths within this long, and everything is stopped."""
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 5.0
DRAIN_TIMEOUT_S = 35.0
"""Longer than any service's own limit for draining."""
LOG_TAIL_BYTES = 2000
_SHARED_CORES = {"GOMP_SPINCOUNT": "2000"}
"""Several workers share this machine's cores: threads that spin for long while they wait take them from each other; ones that
sleep at once wake too late for the small operations of a step."""


class Child:
    """Owns one process at a time; `run` keeps it alive until `stop`."""

    def __init__(self, spec: ServiceSpec, log_file: Path, on_start: Callable[[], None]) -> None:
        self.spec = spec
        self.log_file = log_file
        self.num_restarts = 0
        self._on_start = on_start
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._deaths: deque[float] = deque(maxlen=RESTARTS_MAX)
        log_file.write_bytes(b"")

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the process. The caller's thread must live as long as the process shall."""
        command = ending_with_us(signal.SIGKILL, [sys.executable, "-m", self.spec.kind.value])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("STRATAKV_")}
        with self.log_file.open("ab") as output:
            # A session of its own: Ctrl-C reaches the supervisor only, which then drains in order.
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env={**_SHARED_CORES, **inherited, **self.spec.env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._on_start()

    async def run(self) -> None:
        """Start it again whenever it dies, until `stop`. Raises SetupError if that does not help."""
        while True:
            assert self._process is not None, "not started"
            status = await self._process.wait()
            if self._stopping:
                return
            if status == EXIT_SETUP:
                raise SetupError(f"{self.spec.name} cannot run: {self.log_tail()}")
            now = time.monotonic()
            if len(self._deaths) == RESTARTS_MAX and now - self._deaths[0] < RESTART_WINDOW_S:
                raise SetupError(
                    f"{self.spec.name} died {RESTARTS_MAX + 1} times within {RESTART_WINDOW_S:.0f} s: {self.log_tail()}"
                )
            self._deaths.append(now)
            recent = sum(now - death < RESTART_WINDOW_S for death in self._deaths)
            delay_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (recent - 1))
            log.warning("service_died", service=self.spec.name, status=status, restart_in_s=delay_s)
            await asyncio.sleep(delay_s)
            if self._stopping:
                return
            self.num_restarts += 1
            await self.start()

    async def stop(self) -> None:
        """Let it drain, then kill it."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), DRAIN_TIMEOUT_S)
        except TimeoutError:
            log.warning("service_killed", service=self.spec.name, after_s=DRAIN_TIMEOUT_S)
            self.kill()
            await process.wait()

    def kill(self) -> None:
        """End it at once."""
        self._stopping = True
        self._signal(signal.SIGKILL)

    def log_tail(self) -> str:
        """The last lines of what it wrote, and where the rest is."""
        text = self.log_file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return f"{text or 'it wrote nothing'}\n(all of its output: {self.log_file})"

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
