"""`stratakv up`: starts whole, heals, ends clean."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request
from pathlib import Path

import psycopg
import pytest

from stratakv.up.instance import Instance
from tests.cluster import running_cluster
from tests.support import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _all_pids(cluster: Instance) -> list[int | None]:
    state = cluster.state
    return [state["database_pid"], *(service["pid"] for service in state["services"].values())]


def _is_ready(cluster: Instance) -> bool:
    try:
        with urllib.request.urlopen(f"{cluster.rest_url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _infer(cluster: Instance) -> str:
    with psycopg.connect(host="127.0.0.1", port=cluster.sql_port, user="postgres", dbname="stratakv") as session:
        row = session.execute("SELECT infer('The capital of France is', NULL, '{\"max_tokens\": 8}')").fetchone()
    assert row is not None
    return str(row[0])


def test_what_dies_comes_back_and_nothing_is_left_at_the_end(tmp_path: Path) -> None:
    with running_cluster(tmp_path, STRATAKV_POOL_SECRET="the secret of this pool") as cluster:
        before = _infer(cluster)
        for victim in ("dmp-0", "meta"):
            pid = cluster.pid(victim)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: cluster.pid(victim) not in (None, pid), what=f"{victim} is back")  # noqa: B023
            assert cluster.state["services"][victim]["restarts"] == 1
        eventually(lambda: _is_ready(cluster), timeout_s=60)
        assert _infer(cluster) == before
        pids = _all_pids(cluster)
        assert cluster.stop() == 0
        assert [pid for pid in pids if pid is None or _alive(pid)] == []
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"data", "up.log"}


def test_children_end_with_a_killed_supervisor_and_the_next_one_starts(tmp_path: Path) -> None:
    few = ("--daemons", "1", "--prefill-workers", "0", "--decode-workers", "1")
    with running_cluster(tmp_path, *few, loading=True) as cluster:
        pids = [pid for pid in _all_pids(cluster) if pid is not None]
        cluster.stop(signal.SIGKILL)
        eventually(lambda: not any(_alive(pid) for pid in pids), what="all children ended")
    with running_cluster(tmp_path, *few, STRATAKV_REST_API_KEY="sk-test") as cluster:
        assert _infer(cluster)
        assert cluster.stop(signal.SIGINT) == 0
