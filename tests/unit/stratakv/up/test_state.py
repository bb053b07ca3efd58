"""What `stratakv up` tells others of itself, and how they find it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stratakv.cli.options import running_settings
from stratakv.errors import SetupError
from stratakv.settings import DatabaseSettings, MetaSettings, RestSettings, Secret, Settings, SqlSettings, UpSettings
from stratakv.up.readiness import authorization
from stratakv.up.state import FILE_NAME, StateFile

RUNNING = Settings(
    database=DatabaseSettings(url=Secret("postgresql://ann:a=b%40c@db/x?host=/y")),
    sql=SqlSettings(port=7001, listener_port=7002),
    rest=RestSettings(port=7003),
    meta=MetaSettings(native_port=7004),
    up=UpSettings(data_dir=Path("/kept")),
)


@pytest.fixture
def pid() -> Iterator[int]:
    """A process that looks like `stratakv up`."""
    command = [sys.executable, "-c", "input('.')", "stratakv"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # only now its command line is there
        yield process.pid
        process.kill()


def _write(path: Path, pid: int) -> None:
    path.write_text(json.dumps({"pid": pid, "settings": StateFile(path, RUNNING).told_settings()}))


def test_what_runs_in_the_data_directory_is_found(tmp_path: Path, pid: int) -> None:
    _write(tmp_path / FILE_NAME, pid)
    found = running_settings(None, [f"up.data_dir={tmp_path}"], None)
    assert replace(found, up=RUNNING.up) == RUNNING


def test_a_state_file_can_be_named_and_set_goes_before_it(tmp_path: Path, pid: int) -> None:
    _write(tmp_path / "state.json", pid)
    found = running_settings(None, ["rest.port=9"], tmp_path / "state.json")
    assert (found.sql.port, found.rest.port, found.up) == (7001, 9, RUNNING.up)


def test_what_has_ended_is_passed_over_unless_it_was_named(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "", "stratakv"]) as ended:
        ended.wait()
    path = tmp_path / FILE_NAME
    _write(path, ended.pid)
    assert running_settings(None, [f"up.data_dir={tmp_path}"], None).sql == Settings().sql
    for named in (path, tmp_path / "none.json"):
        with pytest.raises(SetupError, match="no running"):
            running_settings(None, None, named)


def test_a_process_id_that_is_another_programs_by_now_is_passed_over(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as other:
        _write(tmp_path / FILE_NAME, other.pid)
        assert running_settings(None, [f"up.data_dir={tmp_path}"], None).sql == Settings().sql
        other.kill()


def test_readiness_is_asked_with_the_api_key() -> None:
    assert authorization(RestSettings(api_key=Secret("k"))) == {"Authorization": "Bearer k"}
    assert authorization(RestSettings()) == {}
