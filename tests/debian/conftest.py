"""A PostgreSQL of the distribution with TLS, and certificates for it and for a DB node before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from tests.certificates import CertificateFiles, write_certificate
from tests.debian.server import DebianServer, debian_server

PASSWORD = "matrix"


@dataclass(frozen=True, slots=True)
class World:
    """A PostgreSQL with TLS, and the certificates of both."""

    server: DebianServer
    own: CertificateFiles
    other: CertificateFiles
    auth_file: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("tls")
    files = home / "files"
    files.mkdir()
    own, other = write_certificate(files, "own"), write_certificate(files, "other")
    postgres_key = files / "postgres.key"
    postgres_key.touch(0o600)
    postgres_key.write_bytes(other.key.read_bytes())
    settings = {"ssl": "on", "ssl_cert_file": str(other.certificate), "ssl_key_file": str(postgres_key)}
    with debian_server(home, PASSWORD, settings, files=[postgres_key]) as server:
        with psycopg.connect(server.url) as admin:
            row = admin.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'").fetchone()
        assert row is not None
        auth_file = files / "users"
        auth_file.touch(0o600)
        auth_file.write_text(f'; made by the test\n"postgres" "{row[0]}"\n')
        yield World(server, own, other, auth_file)
