"""PgBouncer in front of the DB node, or between it and PostgreSQL: the right role, the right answers, nothing of another's."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from stratakv.postgres import EmbeddedPostgres
from stratakv.postgres.account import choose_account
from stratakv.sqlfunctions import install
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread
from tests.support import eventually, free_port

pytestmark = [pytest.mark.debian, pytest.mark.timeout(120)]

ROLES = ("ann", "ben")
CLIENTS = 6
ROUNDS = 5
PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture(scope="module")
def database(postgres: EmbeddedPostgres) -> Iterator[str]:
    if PGBOUNCER is None:
        pytest.skip("no pgbouncer here: apt-get install pgbouncer")
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE pooled")
        for role in ROLES:
            admin.execute(f"CREATE ROLE {role} LOGIN".encode())
        yield "pooled"
        admin.execute("DROP DATABASE pooled WITH (FORCE)")
        admin.execute(f"DROP ROLE {', '.join(ROLES)}".encode())


@pytest.fixture(scope="module")
def listener_dir(postgres: EmbeddedPostgres, database: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="skv-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        install(postgres.database_url(database), address_in(directory))
        with psycopg.connect(postgres.database_url(database), autocommit=True) as admin:
            admin.execute("CREATE TABLE t AS SELECT i FROM generate_series(1, 20) i; GRANT SELECT ON t TO PUBLIC")
        yield directory


@contextmanager
def _pgbouncer(directory: Path, mode: str, host: str, port: int) -> Iterator[int]:
    """Its port. It asks nobody for a password, as the embedded PostgreSQL, and has two backends at most for each role."""
    own_port = free_port()
    users = directory / "users.txt"
    users.write_text("".join(f'"{role}" ""\n' for role in (*ROLES, "postgres")))
    settings = directory / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\n* = host={host} port={port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {own_port}\n"
        f"unix_socket_dir =\nauth_type = trust\nauth_file = {users}\npool_mode = {mode}\ndefault_pool_size = 2\n"
        "server_reset_query = DISCARD ALL\nignore_startup_parameters = extra_float_digits\n"
    )
    assert PGBOUNCER is not None
    command = choose_account().command(PGBOUNCER, str(settings))  # it refuses root, as PostgreSQL does
    log = directory / "pgbouncer.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, cwd="/") as process,
    ):
        try:
            eventually(lambda: _listens(own_port), what=f"pgbouncer listens, see {log}")
            yield own_port
        finally:
            process.terminate()
            process.wait(20)


def _listens(port: int) -> bool:
    try:
        psycopg.connect(f"postgresql://ann@127.0.0.1:{port}/pooled").close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.fixture(params=["session", "transaction"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def in_front(
    postgres: EmbeddedPostgres, listener_dir: Path, tmp_path: Path, mode: str
) -> Iterator[tuple[FrontThread, int]]:
    """client → PgBouncer → DB node → PostgreSQL"""
    with (
        front_thread(postgres, listener_dir, ReversingModel()) as front,
        _pgbouncer(tmp_path, mode, "127.0.0.1", front.front.port) as port,
    ):
        yield front, port


@pytest.fixture
def behind(
    postgres: EmbeddedPostgres, listener_dir: Path, tmp_path: Path, mode: str
) -> Iterator[tuple[FrontThread, int]]:
    """client → DB node → PgBouncer → PostgreSQL"""
    with _pgbouncer(tmp_path, mode, str(postgres.socket_dir), 5432) as pooler:
        url = f"postgresql://postgres@127.0.0.1:{pooler}/postgres"
        with front_thread(
            url, listener_dir, ReversingModel(), trusted_backend=True, postgres_uid=postgres.uid
        ) as front:
            yield front, front.front.port


def _ask(port: int, role: str, number: int) -> list[tuple[object, ...]]:
    """What one client gets in several statements and transactions."""
    rows: list[tuple[object, ...]] = []
    url = f"postgresql://{role}@127.0.0.1:{port}/pooled"
    with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
        for turn in range(ROUNDS):
            name = f"{role}{number}-{turn}-"
            query = f"SELECT current_user, '{name}' || i, infer('{name}' || i) FROM t ORDER BY i LIMIT 7"
            if turn % 2:
                with connection.transaction():
                    rows += connection.execute(query.encode()).fetchall()
            else:
                rows += connection.execute(query.encode()).fetchall()
    return rows


def _check(front: FrontThread, port: int) -> None:
    front.model.calls.clear()
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [(ROLES[number % 2], number) for number in range(CLIENTS)]
        answers = list(pool.map(lambda client: _ask(port, *client), clients))
    for (role, number), rows in zip(clients, answers, strict=True):
        expected = [f"{role}{number}-{turn}-{i}" for turn in range(ROUNDS) for i in range(1, 8)]
        assert rows == [(role, prompt, prompt[::-1]) for prompt in expected]
    assert {(call.role, call.prompt.startswith(call.role)) for call in front.model.calls} == {
        ("ann", True),
        ("ben", True),
    }


def test_pooler_in_front_keeps_roles_and_answers_apart(in_front: tuple[FrontThread, int]) -> None:
    front, port = in_front
    _check(front, port)
    assert any(call.session.startswith("sql-") for call in front.model.calls), "sessions of the DB node are bound"


def test_pooler_behind_keeps_roles_and_answers_apart_and_sessions_unbound(behind: tuple[FrontThread, int]) -> None:
    front, port = behind
    _check(front, port)
    assert all(call.session.startswith("direct-") for call in front.model.calls), "backends change hands"
    assert front.front.hint_stats.passes == 0


def test_cancel_reaches_the_model_through_the_poolers(in_front: tuple[FrontThread, int]) -> None:
    front, port = in_front
    with (
        psycopg.connect(f"postgresql://ann@127.0.0.1:{port}/pooled", autocommit=True) as connection,
        ThreadPoolExecutor() as pool,
    ):
        waiting = pool.submit(connection.execute, """SELECT infer('x', options => '{"delay_s": 60}')""")
        eventually(lambda: front.model.running == 1)
        connection.cancel_safe(timeout=10)
        with pytest.raises(psycopg.errors.QueryCanceled):
            waiting.result(20)
        eventually(lambda: front.model.running == 0, timeout_s=5)
        assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_role_that_was_set_does_not_outlive_its_transaction(
    behind: tuple[FrontThread, int], postgres: EmbeddedPostgres
) -> None:
    """A pooler that hands a backend on shows in what PostgreSQL reports; so does it in what the model is told."""
    front, port = behind
    with psycopg.connect(postgres.database_url("pooled"), autocommit=True) as admin:
        admin.execute("GRANT ben TO ann")
    with psycopg.connect(f"postgresql://ann@127.0.0.1:{port}/pooled", autocommit=True) as connection:
        with connection.transaction():
            connection.execute("SET LOCAL ROLE ben")
            connection.execute("SELECT infer('as ben')")
        connection.execute("SELECT infer('as ann')")
    assert [(call.role, call.prompt) for call in front.model.calls] == [("ben", "as ben"), ("ann", "as ann")]
