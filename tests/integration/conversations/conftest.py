"""A DB node with conversations over a stand-in worker and a migrated database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest

from stratakv import migrate
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import StandInWorker

Query = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def database_url(postgres_url: str) -> str:
    """With the tenants acme (key acme-key) and bolt."""
    migrate.upgrade(postgres_url)
    return postgres_url


@pytest.fixture
def query(database_url: str) -> Query:
    def run(statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(database_url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    return run


@pytest.fixture
async def worker() -> AsyncIterator[StandInWorker]:
    one = await StandInWorker("w").start()
    yield one
    await one.stop()


@pytest.fixture
async def node(worker: StandInWorker, database_url: str) -> AsyncIterator[RunningNode]:
    async with running_node(worker, database_url=database_url) as running:
        yield running


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
