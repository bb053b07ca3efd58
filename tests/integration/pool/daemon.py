"""A real memory-pool daemon as a child process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from stratakv.wire import Segment
from tests.support import eventually, free_port

MIB = 1024 * 1024


class DaemonProcess:
    """`python -m dmp` on a free port; `segment` is what it would tell the meta server."""

    def __init__(
        self, log_file: Path, *, node: str = "dmp-t", meta_port: int | None = None, flags: Sequence[str] = ()
    ) -> None:
        self._log_file = log_file
        with log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "dmp", "--format", "json", "--node", node, "--port", "0"),
                    *("--segment-bytes", "16MiB", "--native-port", str(meta_port or free_port()), *flags),
                ],
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        eventually(lambda: self.process.poll() is not None or self._serving() is not None, what="daemon to start")
        fields = self._serving()
        assert fields is not None, log_file.read_text()
        epoch = str(fields["epoch"])
        self.segment = Segment(
            node=node,
            epoch=bytes.fromhex(epoch),
            host="127.0.0.1",
            port=int(str(fields["port"])),
            socket_name=f"stratakv-dmp-{epoch}",
            size_bytes=int(str(fields["segment_bytes"])),
        )

    def events(self) -> list[dict[str, object]]:
        """What it has logged so far."""
        lines = self._log_file.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def log(self) -> str:
        """All it has said on standard error."""
        return self._log_file.read_text()

    def freeze(self) -> None:
        """Stop every thread; the signal alone lets some of them run on for a while."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        eventually(
            lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()),
            what="all threads to stop",
        )

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()

    def _serving(self) -> dict[str, object] | None:
        return next((e for e in self.events() if e["event"] == "serving"), None)
