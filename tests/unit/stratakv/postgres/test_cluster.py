"""The embedded PostgreSQL: starts again after any end, serves one owner, and does not outlive it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from stratakv.errors import SetupError
from stratakv.postgres import EmbeddedPostgres, account, find_binaries
from stratakv.postgres.account import Account, Mode
from stratakv.postgres.cluster import _server_processes
from stratakv.settings import PostgresSettings
from tests.support import eventually

SETTINGS = PostgresSettings()
OWNER = """
import sys, time
from pathlib import Path
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import PostgresSettings
with EmbeddedPostgres(PostgresSettings(), Path(sys.argv[1])) as cluster:
    print(cluster.pid, flush=True)
    time.sleep(600)
"""


def test_data_survive_a_restart_and_nothing_runs_between(tmp_path: Path) -> None:
    with EmbeddedPostgres(SETTINGS, tmp_path) as cluster, psycopg.connect(cluster.url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    assert _server_processes(tmp_path / "data") == set()
    with EmbeddedPostgres(SETTINGS, tmp_path) as cluster, psycopg.connect(cluster.url) as connection:
        assert connection.execute("SELECT n FROM kept").fetchone() == (7,)


def test_only_a_private_socket_leads_in(tmp_path: Path) -> None:
    with EmbeddedPostgres(SETTINGS, tmp_path, throw_away=True) as cluster:
        assert stat.S_IMODE(cluster.socket_dir.stat().st_mode) == 0o700
        with psycopg.connect(cluster.url) as connection:
            assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
            assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
    assert not tmp_path.exists()


def test_a_second_owner_is_refused_and_told_why(tmp_path: Path) -> None:
    with EmbeddedPostgres(SETTINGS, tmp_path, throw_away=True) as cluster:
        with pytest.raises(SetupError, match="Another process"), EmbeddedPostgres(SETTINGS, tmp_path):
            pass
        with psycopg.connect(cluster.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_the_server_ends_with_a_killed_owner_and_the_next_start_works(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        owner.kill()
    eventually(lambda: not _server_processes(tmp_path / "data"), what="server ended")
    with EmbeddedPostgres(SETTINGS, tmp_path, throw_away=True):
        pass


def test_a_pid_file_that_names_a_stranger_does_not_stop_the_start(tmp_path: Path) -> None:
    with EmbeddedPostgres(SETTINGS, tmp_path):
        pass
    (tmp_path / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n{tmp_path / 'data'}\n")
    with EmbeddedPostgres(SETTINGS, tmp_path, throw_away=True) as cluster:
        assert cluster.is_running()


def test_a_killed_server_can_be_started_again(tmp_path: Path) -> None:
    with EmbeddedPostgres(SETTINGS, tmp_path, throw_away=True) as cluster:
        os.kill(cluster.pid, signal.SIGKILL)
        eventually(lambda: not cluster.is_running())
        cluster.restart()
        with psycopg.connect(cluster.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_the_uid_is_the_one_other_processes_see(tmp_path: Path) -> None:
    with EmbeddedPostgres(SETTINGS, tmp_path, throw_away=True) as cluster:
        assert cluster.uid == Path(f"/proc/{cluster.pid}").stat().st_uid


def test_a_path_too_long_for_a_socket_is_no_obstacle(tmp_path: Path) -> None:
    with EmbeddedPostgres(SETTINGS, tmp_path / ("x" * 120), throw_away=True) as cluster:
        socket_dir = cluster.socket_dir
        assert len(str(cluster.listener_dir() / ".s.PGSQL.65535")) < 107
    assert not socket_dir.exists()


def test_data_of_another_major_version_are_left_alone_and_told_with_the_settings_to_change(tmp_path: Path) -> None:
    version_file = tmp_path / "data" / "PG_VERSION"
    version_file.parent.mkdir()
    version_file.write_text("14\n")
    with pytest.raises(SetupError, match=r"made by PostgreSQL 14, but .* holds \d+") as caught:
        EmbeddedPostgres(SETTINGS, tmp_path).__enter__()
    for setting in ("STRATAKV_POSTGRES_BIN", "another directory"):
        assert setting in str(caught.value.hint)
    assert [path.name for path in version_file.parent.iterdir()] == ["PG_VERSION"]


def test_a_directory_without_binaries_is_refused_with_the_setting_to_change(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as caught:
        find_binaries(tmp_path)
    assert "STRATAKV_POSTGRES_BIN" in str(caught.value.hint)


def test_binaries_can_be_copied_to_where_another_account_reaches_them(tmp_path: Path) -> None:
    copied = find_binaries(None).copy_to(tmp_path)
    assert copied.directory.is_relative_to(tmp_path)
    with EmbeddedPostgres(PostgresSettings(bin=copied.directory), tmp_path / "home", throw_away=True) as cluster:
        assert cluster.is_running()
    assert copied == find_binaries(None).copy_to(tmp_path), "copied once"


def test_binaries_may_be_copied_by_several_processes_at_a_time(tmp_path: Path) -> None:
    binaries = find_binaries(None)
    with ThreadPoolExecutor(3) as threads:
        copied = list(threads.map(lambda _: binaries.copy_to(tmp_path), range(3)))
    assert copied[0] == copied[1] == copied[2]
    assert [path.name for path in tmp_path.iterdir()] == [copied[0].directory.relative_to(tmp_path).parts[0]]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take on another account")
def test_root_without_user_namespaces_runs_it_as_another_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account, "_probe", _refuse_namespaces)
    place = tmp_path / "unreachable"
    place.mkdir(mode=0o700)
    with EmbeddedPostgres(SETTINGS, place / "pg", throw_away=True) as cluster:
        assert cluster.uid not in (0, os.geteuid())
        with psycopg.connect(cluster.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        home = cluster.log_file.parent
    assert not home.exists()


def _refuse_namespaces(candidate: Account) -> str:
    return "forbidden here" if candidate.mode is Mode.NAMESPACE else ""
