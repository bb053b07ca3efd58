"""Dumps come through the relay as they are, and a restored database answers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import psycopg
import pytest

from stratakv.postgres import EmbeddedPostgres, find_binaries
from tests.integration.sql.conftest import DEBIAN_BIN
from tests.integration.sql.harness import ReversingModel

TIMEOUT_S = 60


@pytest.fixture
def programs(cluster: EmbeddedPostgres, postgres: EmbeddedPostgres) -> Path:
    """Client programs of the server's version."""
    return find_binaries(None).directory if cluster is postgres else DEBIAN_BIN


def _run(*command: str | Path, stdin: str = "") -> str:
    done = subprocess.run(
        [str(part) for part in command], input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return re.sub(r"^\\(un)?restrict .*$", "", done.stdout, flags=re.MULTILINE)  # a random word of newer versions


def test_dump_through_the_relay_is_the_direct_one_and_restores(
    programs: Path, url: str, direct_url: str, cluster: EmbeddedPostgres, model: ReversingModel
) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE t AS SELECT i, repeat('é', i) AS body FROM generate_series(1, 2000) i")
        connection.execute("CREATE VIEW answers AS SELECT i, public.infer(body) AS answer FROM t")
    dump = _run(programs / "pg_dump", url)
    assert dump == _run(programs / "pg_dump", direct_url)
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE restored")
        try:
            restored = cluster.database_url("restored")
            _run(programs / "psql", restored, "-Xqo", "/dev/null", "-v", "ON_ERROR_STOP=1", stdin=dump)
            with psycopg.connect(restored) as connection:
                assert connection.execute("SELECT answer FROM answers WHERE i = 2").fetchone() == ("éé",)
        finally:
            admin.execute("DROP DATABASE restored WITH (FORCE)")
    assert [call.database for call in model.calls] == ["restored"]


def test_policy_of_row_level_security_may_ask_the_model(url: str, model: ReversingModel) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE ROLE reader")
        try:
            connection.execute("CREATE TABLE t AS SELECT unnest(ARRAY['aba', 'abc']) AS body")
            connection.execute("CREATE POLICY same ON t USING (stratakv.infer(body) = body)")
            connection.execute("ALTER TABLE t ENABLE ROW LEVEL SECURITY; GRANT SELECT ON t TO reader")
            connection.execute("SET ROLE reader")
            assert connection.execute("SELECT body FROM t").fetchall() == [("aba",)]
            connection.execute("RESET ROLE")
        finally:
            connection.execute("DROP OWNED BY reader CASCADE; DROP ROLE reader")
    assert {call.role for call in model.calls} == {"reader"}
