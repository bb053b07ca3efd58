"""`stratakv sim` as an operator calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec

from tests.unit.dbnode.simulation.test_profiles import PROFILE, stored

TIMEOUT_S = 60


def sim(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stratakv.cli", "sim", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def write_trace(path: Path) -> Path:
    lines = [
        {"timestamp": 1000 * n, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 100 + n]}
        for n in range(20)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_policies_are_compared_on_a_trace(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    done = sim("--trace", str(trace), "--workers", "2", "--policy", "cost", "--policy", "round_robin", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["settings"]["workers"] == 2
    assert set(found["policies"]) == {"cost", "round_robin"}
    assert found["policies"]["cost"]["hit_share_of_infinite"] == 1.0


def test_a_wrong_trace_is_told_by_its_line_and_ends_with_status_2(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    trace.write_text(trace.read_text() + "{}\n")
    done = sim("--trace", str(trace))
    assert done.returncode == 2
    assert "line 21" in done.stderr
    assert "Traceback" not in done.stderr


def test_rates_are_taken_from_a_profile_and_not_given_twice(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    profile = tmp_path / "profile.json"
    profile.write_bytes(msgspec.json.encode([stored()]))
    done = sim("--trace", str(trace), "--profile", str(profile), "--pool-gb-per-s", "0", "--json")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)["settings"]
    assert settings["profile"]["model"] == stored().key.model
    assert settings["pool_bytes_per_s"] == 0
    assert settings["prefill_tokens_per_s"] == PROFILE.prefill[2].num_tokens / PROFILE.prefill[2].seconds
    both = sim("--trace", str(trace), "--profile", str(profile), "--prefill-tokens-per-s", "9")
    assert both.returncode == 2
    assert "--profile" in both.stderr
