"""End to end on the distribution's PostgreSQL with passwords: migrate, install, run everything, ask in SQL."""

from __future__ import annotations

import json
import os
import pwd
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from stratakv.postgres.account import Account, Mode
from stratakv.up.instance import Instance
from tests.cluster import running_cluster, stratakv
from tests.support import eventually, free_port

pytestmark = [pytest.mark.debian, pytest.mark.timeout(300)]

PASSWORD = secrets.token_urlsafe(12)


def _account() -> Account:
    """PostgreSQL's own account if we are root, else ours."""
    if os.geteuid() != 0:
        return Account(Mode.PLAIN, os.geteuid(), os.getegid())
    entry = pwd.getpwnam("postgres")
    return Account(Mode.ACCOUNT, entry.pw_uid, entry.pw_gid)


@pytest.fixture(scope="module")
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A throw-away cluster that lets nobody in without SCRAM, on a port of its own."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not programs:
        pytest.skip("no PostgreSQL server of the distribution is installed")
    account = _account()
    home = tmp_path_factory.mktemp("debian")
    for directory in (home, *home.parents[:2]):  # pytest's directories let nobody but us through
        directory.chmod(directory.stat().st_mode | 0o011)
    data = home / "data"
    data.mkdir(mode=0o700)
    password_file = home / "password"
    password_file.write_text(PASSWORD)
    for path in (data, password_file):
        os.chown(path, account.uid, account.gid)
    flags = ["-D", str(data), "-U", "postgres", "-A", "scram-sha-256", f"--pwfile={password_file}", "-N", "-E", "UTF8"]
    initdb = account.command(str(programs[-1] / "initdb"), *flags, "--locale=C.UTF-8")
    subprocess.run(initdb, check=True, capture_output=True, cwd="/")
    port = free_port()
    options = [f"-cport={port}", "-clisten_addresses=127.0.0.1", f"-cunix_socket_directories={data}", "-cfsync=off"]
    server = account.command(str(programs[-1] / "postgres"), "-D", str(data), *options)
    log = home / "postgres.log"
    with log.open("wb") as output, subprocess.Popen(server, stdout=output, stderr=output, cwd="/") as process:
        url = f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres"
        try:
            eventually(lambda: process.poll() is None and _answers(url), what=f"PostgreSQL started, see {log}")
            yield url
        finally:
            process.terminate()
            process.send_signal(2)


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.fixture(scope="module")
def cluster(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    with running_cluster(tmp_path_factory.mktemp("up"), STRATAKV_DATABASE_URL=database_url) as cluster:
        yield cluster


def test_a_password_is_asked_for_at_the_db_node(cluster: Instance) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(host="127.0.0.1", port=cluster.sql_port, user="postgres", dbname="postgres", password="wrong")


def test_infer_answers_through_the_db_node(cluster: Instance) -> None:
    with psycopg.connect(
        host="127.0.0.1", port=cluster.sql_port, user="postgres", dbname="postgres", password=PASSWORD
    ) as session:
        row = session.execute("SELECT infer('The capital of France is', NULL, '{\"max_tokens\": 8}')").fetchone()
    assert row is not None
    assert row[0]


def test_infer_answers_a_session_that_does_not_come_through_the_db_node(cluster: Instance, database_url: str) -> None:
    with psycopg.connect(database_url) as session:
        row = session.execute("SELECT infer('Two plus two is', NULL, '{\"max_tokens\": 8}')").fetchone()
    assert row is not None
    assert row[0]


def test_status_sees_every_part(cluster: Instance) -> None:
    shown = json.loads(stratakv(cluster, "status", "--json").stdout)
    assert shown["db_node"]["ready"] == "yes"
    assert {worker["info"]["role"] for worker in shown["workers"]} == {"prefill", "decode"}
    assert len(shown["nodes"]) == 2
