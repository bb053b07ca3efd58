"""PostgreSQL with the SQL functions, behind a SQL face; also the distribution's server, where there is one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import psycopg
import pytest

from dbnode.sql.hints import HintStats
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import PostgresSettings
from stratakv.sqlfunctions import install
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread

DEBIAN_BIN = Path("/usr/lib/postgresql/15/bin")
ROLES = ("alice", "bob", "team")
Connection = psycopg.Connection[tuple[object, ...]]
_numbers = count()
_TABLE = """
CREATE TABLE t AS
SELECT i, i % 10 AS g, 'text ' || i % 40 AS body, CASE WHEN i % 7 = 0 THEN NULL ELSE 'n' || i END AS maybe
FROM generate_series(1, 120) i
"""


@pytest.fixture(scope="session", params=["embedded", pytest.param("debian", marks=pytest.mark.debian)])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    if request.param == "embedded":
        yield request.getfixturevalue("postgres")
        return
    if not (DEBIAN_BIN / "postgres").exists():
        pytest.skip("no PostgreSQL of the distribution here")
    settings = PostgresSettings(bin=DEBIAN_BIN)
    with EmbeddedPostgres(settings, tmp_path_factory.mktemp("debian"), throw_away=True) as server:
        yield server


@pytest.fixture(scope="session")
def listener_dir(cluster: EmbeddedPostgres) -> Iterator[Path]:
    """Short enough for a socket, and within reach of PostgreSQL's account."""
    with tempfile.TemporaryDirectory(prefix="skv-") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)


@pytest.fixture(scope="session")
def shared_front(cluster: EmbeddedPostgres, listener_dir: Path) -> Iterator[FrontThread]:
    with front_thread(cluster, listener_dir, ReversingModel()) as thread:
        yield thread


@pytest.fixture
def front(shared_front: FrontThread) -> FrontThread:
    """A running SQL face."""
    shared_front.model.calls.clear()
    shared_front.model.most_running = 0
    return shared_front


@pytest.fixture
def model(front: FrontThread) -> ReversingModel:
    return front.model


@pytest.fixture(scope="session")
def template(cluster: EmbeddedPostgres, listener_dir: Path) -> str:
    """A database with the functions, to copy."""
    name = f"sql_template_{next(_numbers)}"
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    install(cluster.database_url(name), address_in(listener_dir))
    return name


@pytest.fixture
def database(cluster: EmbeddedPostgres, template: str) -> Iterator[str]:
    """Name of a database with the functions, the test's own."""
    name = f"sql_{next(_numbers)}"
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def url(front: FrontThread, database: str) -> str:
    """The test's database through the relay, as superuser."""
    return front.url(database)


@pytest.fixture
def direct_url(cluster: EmbeddedPostgres, database: str, front: FrontThread) -> str:
    """The test's database without the relay, as superuser; the face runs."""
    return cluster.database_url(database)


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    """Through the relay, in autocommit, with a table."""
    with psycopg.connect(url, autocommit=True) as opened:
        opened.execute(_TABLE)
        yield opened


@pytest.fixture
def stats(front: FrontThread) -> Callable[[], HintStats]:
    """Counters of looking ahead, of this test only."""
    before = replace(front.front.hint_stats)

    def since() -> HintStats:
        now = front.front.hint_stats
        return HintStats(*(getattr(now, name) - getattr(before, name) for name in HintStats.__slots__))

    return since


@pytest.fixture
def roles(direct_url: str) -> Iterator[Connection]:
    """alice and bob are ordinary; alice may become team."""
    with psycopg.connect(direct_url, autocommit=True) as admin:
        for role in ROLES:
            admin.execute(f"CREATE ROLE {role} LOGIN")
        admin.execute("GRANT team TO alice")
        yield admin
        for role in ROLES:
            admin.execute(f"DROP OWNED BY {role} CASCADE")
            admin.execute(f"DROP ROLE {role}")


@pytest.fixture
def alice(front: FrontThread, database: str, roles: Connection) -> Iterator[Connection]:
    with psycopg.connect(front.url(database, "alice"), autocommit=True) as connection:
        yield connection
