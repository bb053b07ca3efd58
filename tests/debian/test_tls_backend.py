"""TLS between DB node and PostgreSQL: whom it trusts, and what goes through it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from stratakv.settings import SqlSettings
from tests.debian.conftest import PASSWORD, World
from tests.integration.sql.harness import FrontThread, ReversingModel, front_on

pytestmark = pytest.mark.debian


def _settings(world: World) -> SqlSettings:
    return SqlSettings(
        port=0,
        listener_port=0,
        listener_key="k",  # type: ignore[arg-type]
        tls_cert=world.own.certificate,
        tls_key=world.own.key,
        auth_file=world.auth_file,
    )


@pytest.mark.parametrize(
    ("host", "mode", "error"),
    [
        ("127.0.0.1", "verify-full", None),
        ("localhost", "verify-full", "not to be trusted: Hostname mismatch"),
        ("localhost", "verify-ca", None),
        ("127.0.0.1", "verify-ca-other", "not to be trusted: self-signed certificate"),
        ("127.0.0.1", "require", None),
    ],
)
def test_postgresql_is_trusted_as_the_mode_says(world: World, host: str, mode: str, error: str | None) -> None:
    root = world.own if mode.endswith("-other") else world.other
    query = f"sslmode={mode.removesuffix('-other')}"
    if mode != "require":
        query += f"&sslrootcert={root.certificate}"
    with front_on(f"postgresql://{host}:{world.server.port}/?{query}", _settings(world), ReversingModel()) as front:
        if error is None:
            with psycopg.connect(front.url("postgres"), password=PASSWORD) as connection:
                assert connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone() == (
                    True,
                )
            return
        with pytest.raises(psycopg.OperationalError, match=error):
            psycopg.connect(front.url("postgres"), password=PASSWORD)


@pytest.fixture
def face(world: World) -> Iterator[FrontThread]:
    """TLS with different certificates on both legs; the DB node runs the logins."""
    with front_on(world.server.url + "?sslmode=require", _settings(world), ReversingModel()) as front:
        yield front


@pytest.mark.parametrize("sslmode", ["disable", "require"])
def test_a_whole_cluster_is_copied_through_the_gateway(face: FrontThread, tmp_path: Path, sslmode: str) -> None:
    """Base backup and WAL stream: replication is relayed as it is, at its own speed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))[-1]
    target = tmp_path / "copy"
    environment = {**os.environ, "PGPASSWORD": PASSWORD, "PGSSLMODE": sslmode, "PGCHANNELBINDING": "prefer"}
    port = str(face.settings.port)
    command = [
        programs / "pg_basebackup",
        "-h",
        "127.0.0.1",
        "-p",
        port,
        "-U",
        "postgres",
        "-D",
        target,
        "-X",
        "stream",
    ]
    subprocess.run([*command, "-c", "fast", "-N"], env=environment, check=True, timeout=60, capture_output=True)
    subprocess.run([programs / "pg_verifybackup", target], check=True, timeout=60, capture_output=True)


def test_verifiers_are_read_again(world: World, tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.touch(0o600)
    users.write_text("")
    settings = SqlSettings(
        port=0,
        listener_port=0,
        listener_key="k",  # type: ignore[arg-type]
        tls_cert=world.own.certificate,
        tls_key=world.own.key,
        auth_file=users,
    )
    with front_on(world.server.url + "?sslmode=require", settings, ReversingModel()) as front:
        url = front.url("postgres") + "?sslmode=require&channel_binding=require"
        with pytest.raises(psycopg.OperationalError, match="binds its login"):
            psycopg.connect(url, password=PASSWORD)
        users.write_text(world.auth_file.read_text())
        front.loop.call_soon_threadsafe(front.front.reload)
        psycopg.connect(url, password=PASSWORD).close()
        users.write_text('"postgres" "no verifier"')
        front.loop.call_soon_threadsafe(front.front.reload)  # refused; what was known stays
        psycopg.connect(url, password=PASSWORD).close()


def test_verifier_of_an_old_password_lets_nobody_in(world: World, tmp_path: Path) -> None:
    """Neither who knows the new password nor who knows the old one."""
    with psycopg.connect(world.server.url, autocommit=True) as admin:
        admin.execute("CREATE ROLE moved LOGIN PASSWORD 'old'")
        row = admin.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'moved'").fetchone()
        assert row is not None
        admin.execute("ALTER ROLE moved PASSWORD 'new'")
        users = tmp_path / "users"
        users.touch(0o600)
        users.write_text(f'"moved" "{row[0]}"')
        settings = SqlSettings(port=0, listener_port=0, listener_key="k", auth_file=users)  # type: ignore[arg-type]
        try:
            with front_on(world.server.url, settings, ReversingModel()) as front:
                for password in ("old", "new"):
                    with pytest.raises(
                        psycopg.OperationalError, match='password authentication failed for user "moved"'
                    ):
                        psycopg.connect(front.url("postgres", "moved"), password=password)
        finally:
            admin.execute("DROP ROLE moved")
