"""A real memory-pool daemon as a child process."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from stratakv.wire import Segment
from tests.service_process import ServiceProcess
from tests.support import eventually, free_port

MIB = 1024 * 1024


class DaemonProcess(ServiceProcess):
    """`python -m dmp` on a free port; `segment` is what it would tell the meta server."""

    def __init__(
        self,
        log_file: Path,
        *,
        node: str = "dmp-t",
        meta_port: int | None = None,
        flags: Sequence[str] = (),
        module: str = "dmp",
        env: Mapping[str, str] | None = None,
    ) -> None:
        own = ["--format", "json", "--node", node, "--port", "0", "--segment-bytes", "16MiB"]
        super().__init__(module, [*own, "--native-port", str(meta_port or free_port()), *flags], env or {}, log_file)
        log_file.write_bytes(b"")
        self.start()
        eventually(lambda: self.has_ended() or self._serving() is not None, what="daemon to start")
        fields = self._serving()
        assert fields is not None, self.log()
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
        lines = self.log().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _serving(self) -> dict[str, object] | None:
        return next((e for e in self.events() if e["event"] == "serving"), None)
