"""A migrated database of the test's own, and usage events to write into it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg
import psycopg
import pytest

from dbnode.generate import Caller, GenerateRequest, Outcome, PromptTiers, Settled, Source, Timings, Usage
from dbnode.usage import UsageWriter
from stratakv.settings import DatabaseSettings, Secret
from stratakv.tenancy.values import Tenant

Rows = list[tuple[Any, ...]]


@pytest.fixture
def url(migrated_url: str) -> str:
    """URL, as superuser, of a database with the newest schema and the tenants acme and bolt."""
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        connection.execute("INSERT INTO stratakv.tenants (name) VALUES ('acme'), ('bolt')")
    return migrated_url


@pytest.fixture
def query(url: str) -> Callable[..., Rows]:
    """Runs one statement as superuser; its rows."""

    def run(statement: str, *parameters: object) -> Rows:
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    return run


def event(
    request_id: str,
    tenant: str = "acme",
    *,
    model: str = "m",
    source: Source = Source.REST,
    prompt: int = 10,
    cached: int = 4,
    generated: int = 5,
    outcome: Outcome = Outcome.COMPLETED,
    error_code: str | None = None,
) -> Settled:
    """One request that has ended."""
    caller = Caller(tenant=Tenant(0, tenant))
    request = GenerateRequest(request_id=request_id, source=source, arrived_s=0.0, caller=caller)
    tiers = PromptTiers(computed=prompt - cached, l1=cached)
    return Settled(request, model, outcome, error_code, Usage(prompt, generated, tiers, Timings(1.0, 0.0, 2.0)))


async def write(url: str, events: Sequence[Settled]) -> None:
    """As a DB node does."""
    writer = UsageWriter(DatabaseSettings(url=Secret(url)), lambda: None)
    for settled in events:
        writer.settled(settled)
    await writer.close()


def write_now(url: str, *events: Settled) -> None:
    asyncio.run(write(url, events))


async def connect(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(url)
