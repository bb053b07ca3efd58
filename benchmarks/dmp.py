"""dmp: pages between a process and a memory-pool daemon, against Mooncake Store, a bare socket and a memory copy.

Put and get of pages of four sizes, one at a time and a hundred at once, checksums on; every arm is a process of its own with the
same buffer, and the arms take turns. Ours includes asking the daemon for room, headers, and checksums made and verified, but no
meta server; Mooncake's includes its master. Both have touched the memory they lend before anything is measured. `shm_in_place`
verifies pages where they lie and copies nothing.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import mooncake
from benchmarks.harness import parse_options, report
from stratakv import _native
from stratakv.wire import Segment

KIB, MIB, GIB = 1024, 1024**2, 1024**3
SIZES = (64 * KIB, 360 * KIB, 1 * MIB, 4 * MIB)
CLAIMED = (360 * KIB, 100, 1)
"""Page size, batch and layers that the ratios are about."""
BATCHES = {1: (200, 40), 100: (3, 2)}
"""Pages at once → calls per turn, and that with --quick."""
TURNS, TURNS_QUICK = 5, 3
ENGINE_LAYERS = 30
SEGMENT_BYTES = 2 * GIB
START_S_MAX = 60.0
OPERATIONS = {
    "tcp": ("put", "get"),
    "shm": ("put", "get", "in_place"),
    "mooncake": ("put", "get"),
    "socket": ("put", "get", "sendfile"),
    "copy": ("put", "get"),
}
OURS = ("tcp", "shm")


class ArmProcess:
    """`benchmarks.dmp_arms` at work."""

    def __init__(self, *arguments: str) -> None:
        code = "from benchmarks.dmp_arms import serve; serve()"
        environment = mooncake.with_environment()
        self._arguments = arguments
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, what: str, **arguments: int) -> list[float]:
        """The answer to one request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(b">"):
                seconds: list[float] = json.loads(line[1:])
                return seconds
        raise SystemExit(
            f"the arm {self._arguments[0]} ended in the middle of {what} with status {self._process.wait()}"
        )

    def end(self) -> None:
        self._process.communicate()


@contextmanager
def running_daemon(segment_bytes: int = SEGMENT_BYTES) -> Iterator[str]:
    """A daemon of ours; its segment as JSON. No meta server is there to be asked."""
    flags = ["--format", "json", "--node", "bench", "--port", "0", "--segment-bytes", str(segment_bytes)]
    daemon = subprocess.Popen(
        [sys.executable, "-m", "dmp", *flags, "--native-port", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert daemon.stdout is not None
    try:
        for line in daemon.stdout:
            event = json.loads(line) if line.startswith(b"{") else {}
            if event.get("event") == "serving":
                break
        else:
            raise SystemExit("the daemon did not start")
        epoch = bytes.fromhex(event["epoch"])
        name = f"stratakv-dmp-{event['epoch']}"
        segment = Segment("bench", epoch, "127.0.0.1", int(event["port"]), name, int(event["segment_bytes"]))
        _await_memory(daemon.pid, segment_bytes)
        with _read_on(daemon):
            yield msgspec.json.encode(segment).decode()
    finally:
        daemon.terminate()
        daemon.wait()


def _await_memory(pid: int, segment_bytes: int) -> None:
    """The daemon touches its memory in the background; nothing is measured before it is through."""
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        if int(status.partition("RssShmem:")[2].split()[0]) * KIB >= segment_bytes:
            return
        time.sleep(0.1)


@contextmanager
def _read_on(daemon: subprocess.Popen[bytes]) -> Iterator[None]:
    """Nobody reads the daemon's log any more, and it must not wait for a reader."""
    drain = subprocess.Popen(["cat"], stdin=daemon.stdout, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        drain.terminate()
        drain.wait()


def measure(
    arms: dict[str, ArmProcess], shape: tuple[int, int, int], *, quick: bool
) -> dict[tuple[str, str], list[float]]:
    """(arm, operation) → seconds of every call; the arms take turns, in another order each time."""
    page_bytes, pages, layers = shape
    for arm in arms.values():
        arm.ask("prepare", page_bytes=page_bytes, pages=pages, layers=layers)
    times = BATCHES[pages][quick]
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    names = list(arms)
    for turn in range(TURNS_QUICK if quick else TURNS):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            for operation in OPERATIONS[name]:
                seconds[name, operation] += arms[name].ask(operation, times=times)
    return seconds


def figures(seconds: list[float], total_bytes: int) -> dict[str, Any]:
    """GB/s at the median, and the quantiles of a call."""
    ordered = sorted(seconds)
    p50, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.99))
    return {
        "gb_s": round(total_bytes / p50 / 1e9, 3),
        "gb_s_max": round(total_bytes / ordered[0] / 1e9, 3),
        "p50_ms": round(p50 * 1e3, 3),
        "p99_ms": round(p99 * 1e3, 3),
        "runs": len(ordered),
    }


def name_of(shape: tuple[int, int, int]) -> str:
    page_bytes, pages, layers = shape
    return f"{page_bytes // KIB}KiB x {pages}" + (f", {layers} layers" if layers > 1 else "")


def main() -> int:
    options = parse_options(__doc__)
    mooncake.require()
    shapes = [(size, pages, 1) for size in SIZES for pages in BATCHES]
    by_layers = (CLAIMED[0], CLAIMED[1], ENGINE_LAYERS)
    results: dict[str, dict[str, dict[str, Any]]] = {"ours": {}, "baseline": {}}
    started = time.monotonic()
    with ExitStack() as stack:
        segment = stack.enter_context(running_daemon())
        arms = {
            "tcp": ArmProcess("ours", "tcp", segment),
            "shm": ArmProcess("ours", "shm", segment),
            "mooncake": ArmProcess("mooncake", str(SEGMENT_BYTES)),
            "socket": ArmProcess("socket"),
            "copy": ArmProcess("copy"),
        }
        for arm in arms.values():
            stack.callback(arm.end)
        for shape in [*shapes, by_layers]:
            taking_part = {name: arms[name] for name in OURS} if shape == by_layers else arms
            for (arm_name, operation), seconds in measure(taking_part, shape, quick=options.quick).items():
                side = results["ours" if arm_name in OURS else "baseline"]
                side.setdefault(name_of(shape), {})[f"{arm_name}_{operation}"] = figures(seconds, shape[0] * shape[1])
    claimed = {**results["ours"][name_of(CLAIMED)], **results["baseline"][name_of(CLAIMED)]}

    def ratio(ours: str, theirs: str) -> float:
        return round(float(claimed[ours]["gb_s"] / claimed[theirs]["gb_s"]), 2)

    report(
        "dmp",
        {
            "claimed": name_of(CLAIMED),
            "checksums": _native.moves.KERNEL,
            "turns": TURNS_QUICK if options.quick else TURNS,
            "quick": options.quick,
            "mooncake": mooncake.version(),
            "seconds": round(time.monotonic() - started, 1),
        },
        results["ours"],
        results["baseline"],
        {
            "put_tcp_over_mooncake": ratio("tcp_put", "mooncake_put"),
            "get_tcp_over_mooncake": ratio("tcp_get", "mooncake_get"),
            "put_tcp_over_socket": ratio("tcp_put", "socket_put"),
            "get_tcp_over_socket": ratio("tcp_get", "socket_get"),
            "get_tcp_over_sendfile": ratio("tcp_get", "socket_sendfile"),
            "put_shm_over_copy": ratio("shm_put", "copy_put"),
            "get_shm_over_copy": ratio("shm_get", "copy_get"),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
