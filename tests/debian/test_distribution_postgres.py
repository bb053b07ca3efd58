"""End to end on the distribution's PostgreSQL with passwords: migrate, install, run everything, ask in SQL."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator

import psycopg
import pytest

from stratakv.up.instance import Instance
from tests.cluster import running_cluster, stratakv
from tests.debian.server import debian_server

pytestmark = [pytest.mark.debian, pytest.mark.timeout(300)]

PASSWORD = secrets.token_urlsafe(12)


@pytest.fixture(scope="module")
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with debian_server(tmp_path_factory.mktemp("debian"), PASSWORD) as server:
        yield server.url


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
    is_disk = sorted("disk_of" in node["segment"] for node in shown["nodes"])
    assert is_disk == [False, False, True, True]
