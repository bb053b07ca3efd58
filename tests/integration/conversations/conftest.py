"""A DB node with conversations over a stand-in worker and a migrated database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from stratakv import migrate
from stratakv.postgres import EmbeddedPostgres
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import StandInWorker

Query = Callable[..., list[tuple[Any, ...]]]
_numbers = count()


@pytest.fixture(scope="module")
def database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """With the newest schema."""
    name = f"conversations_{next(_numbers)}"
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
        migrate.upgrade(postgres.database_url(name))
        yield postgres.database_url(name)
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def query(database_url: str) -> Query:
    def run(statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(database_url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    return run


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_worker() -> AsyncIterator[StandInWorker]:
    one = await StandInWorker("w").start()
    yield one
    await one.stop()


@pytest.fixture
def worker(shared_worker: StandInWorker) -> StandInWorker:
    """As if it had just started."""
    shared_worker.requests.clear()
    shared_worker.token_delay_s, shared_worker.refuse_status = 0.0, None
    return shared_worker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_node(shared_worker: StandInWorker, database_url: str) -> AsyncIterator[RunningNode]:
    async with running_node(shared_worker, database_url=database_url) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def node(shared_node: RunningNode, worker: StandInWorker, query: Query) -> RunningNode:
    """Without any conversation."""
    # Off the loop: the node, which runs on it, may be in the middle of a statement, whose lock this waits for.
    await asyncio.to_thread(query, "TRUNCATE stratakv.conversations CASCADE")
    return shared_node


async def call(node: RunningNode, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
    """Status and body of an answer."""
    async with node.http.request(method, f"/v1/conversations{path}", json=body, headers=headers) as response:
        return response.status, await response.json()


async def create(node: RunningNode, *contents: str, **more: Any) -> str:
    """A conversation that begins with these, said by the user and the assistant in turn."""
    items = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    status, made = await call(node, "POST", "", {"items": items} | more)
    assert status == 200, made
    return str(made["id"])


async def say(node: RunningNode, conversation: str, text: str, **more: Any) -> tuple[int, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8} | more
    return await call(node, "POST", f"/{conversation}/messages", body)


async def contents(node: RunningNode, conversation: str) -> list[str]:
    status, found = await call(node, "GET", f"/{conversation}/items?order=asc&limit=100")
    assert status == 200, found
    return [item["content"][0]["text"] for item in found["data"]]
