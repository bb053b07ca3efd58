"""`python -m dbnode` as a process: start-up refusals, usage rows, SQL, drain."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psycopg
import pytest
import pytest_asyncio
from psycopg.conninfo import make_conninfo

from stratakv import migrate
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import SqlSettings
from stratakv.sqlfunctions import ListenerAddress, install
from stratakv.text import decode, load_tokenizer, render_chat
from tests.integration.dbnode.running_node import CACHE_DIR
from tests.stand_in_worker import MODEL, StandInWorker, expected_tokens
from tests.support import eventually_async, free_port

START_S = 40.0


@dataclass
class Process:
    """A DB node and where it listens."""

    popen: subprocess.Popen[bytes]
    url: str
    sql_port: int

    def ended(self) -> bool:
        return self.popen.poll() is not None


def command(database_url: str | None, *flags: str, rest_port: int, sql_port: int, worker: str = "") -> list[str]:
    database = [f"--set=database.url={database_url}"] if database_url else []
    ports = [f"--set=rest.port={rest_port}", f"--set=sql.port={sql_port}", f"--set=model.cache_dir={CACHE_DIR}"]
    router = [f"--set=router.workers={worker}", "--set=router.refresh_s=0.1", f"--set=meta.native_port={free_port()}"]
    return [sys.executable, "-m", "dbnode", *database, *ports, *router, *flags]


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[StandInWorker]:
    worker = await StandInWorker("w0").start()
    yield worker
    await worker.stop()


@pytest.fixture
def listener_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="skv-") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)


@pytest_asyncio.fixture
async def node(
    postgres: EmbeddedPostgres, postgres_url: str, worker: StandInWorker, listener_dir: Path
) -> AsyncIterator[Process]:
    await asyncio.to_thread(migrate.upgrade, postgres_url)
    rest_port, sql_port = free_port(), free_port()
    sql = [
        f"--set=sql.listener_dir={listener_dir}",
        "--set=sql.backend_trusted=true",
        f"--set=sql.backend_uid={postgres.uid}",
    ]
    arguments = command(postgres_url, *sql, rest_port=rest_port, sql_port=sql_port, worker=worker.url)
    popen = await asyncio.to_thread(subprocess.Popen[bytes], arguments)
    process = Process(popen, f"http://127.0.0.1:{rest_port}", sql_port)
    try:
        await eventually_async(lambda: _is_ready(process), timeout_s=START_S, what="DB node ready")
        yield process
    finally:
        if not process.ended():
            popen.kill()
        await asyncio.to_thread(popen.wait)


async def _is_ready(process: Process) -> bool:
    assert not process.ended(), "the DB node ended while it was starting"
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{process.url}/ready") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def test_sql_and_rest_end_in_the_same_place_and_usage_is_written_once(
    node: Process, worker: StandInWorker, postgres_url: str, listener_dir: Path
) -> None:
    tokenizer = load_tokenizer(CACHE_DIR / "models" / MODEL)
    settings = SqlSettings(listener_dir=listener_dir, port=node.sql_port)
    await asyncio.to_thread(install, postgres_url, ListenerAddress.from_settings(settings))
    connect = make_conninfo(postgres_url, host="127.0.0.1", port=node.sql_port)
    async with await psycopg.AsyncConnection.connect(connect, autocommit=True) as sql:
        cursor = await sql.execute("""SELECT stratakv.infer('Hello', NULL, '{"max_tokens": 9}')""")
        row = await cursor.fetchone()
        prompt = render_chat(tokenizer, [{"role": "user", "content": "Hello"}])
        assert row == (decode(tokenizer, expected_tokens(prompt, 9)),)
        assert worker.requests[0]["temperature"] == 0.0
        with pytest.raises(psycopg.DataError, match="no_such"):
            await sql.execute("""SELECT stratakv.infer('Hello', NULL, '{"no_such": 9}')""")
        worker.hang = True
        with pytest.raises(psycopg.errors.QueryCanceled, match="deadline"):
            await sql.execute("""SELECT stratakv.infer('Hello', NULL, '{"timeout_ms": 200}')""")
        worker.hang = False
    async with aiohttp.ClientSession() as session:
        body = {"prompt": prompt, "max_tokens": 4}
        async with session.post(f"{node.url}/v1/completions", json=body) as response:
            assert response.status == 200
    query = "SELECT source, prompt_tokens, cached_l1_tokens, generated_tokens, outcome FROM stratakv.usage_events"
    expected = {
        ("sql", len(prompt), 0, 9, "completed"),
        ("rest", len(prompt), len(prompt) // 16 * 16, 4, "completed"),
    }
    async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as connection:

        async def written() -> bool:
            return {*await (await connection.execute(query)).fetchall()} >= expected - {
                ("sql", 0, 0, 0, "invalid_request")
            }

        await eventually_async(written, what="usage rows")


async def test_a_drain_finishes_what_is_in_flight_and_exits_0(node: Process, worker: StandInWorker) -> None:
    os.kill(node.popen.pid, signal.SIGHUP)  # it reads files again, and goes on
    worker.token_delay_s = 0.02
    async with aiohttp.ClientSession() as session:
        body = {"prompt": [1000] * 20, "max_tokens": 60, "stream": True}
        response = await session.post(f"{node.url}/v1/completions", json=body)
        await response.content.readany()
        os.kill(node.popen.pid, signal.SIGTERM)
        await eventually_async(lambda: _is_refused(session, node), what="refused while draining")
        rest = await response.content.read()
        while more := await response.content.read():
            rest += more
    assert rest.endswith(b"data: [DONE]\n\n")
    await eventually_async(node.ended, what="exit")
    assert node.popen.returncode == 0


async def _is_refused(session: aiohttp.ClientSession, node: Process) -> bool:
    async with session.get(f"{node.url}/ready") as response:
        if response.status != 503:
            return False
    async with session.post(f"{node.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}) as response:
        return response.status == 503


def _refusal(*arguments: str) -> str:
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=START_S, check=False)
    assert result.returncode == 2, result.stderr
    return result.stderr


def test_an_unmigrated_database_is_refused_with_the_command_to_run(postgres_url: str) -> None:
    arguments = command(postgres_url, rest_port=free_port(), sql_port=free_port())
    assert "stratakv migrate upgrade" in _refusal(*arguments)


def test_a_taken_port_and_an_open_host_without_key_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = _refusal(*command("postgresql://x", rest_port=port, sql_port=free_port()))
    assert f"port {port}" in message
    message = _refusal(
        *command("postgresql://x", "--set=rest.host=0.0.0.0", rest_port=free_port(), sql_port=free_port())
    )
    assert "rest.api_key" in message


def test_without_a_database_it_says_which_setting_is_missing() -> None:
    assert "STRATAKV_DATABASE_URL" in _refusal(*command(None, rest_port=free_port(), sql_port=free_port()))
